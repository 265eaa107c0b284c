"""Plugin for pytest on Windows: which tests do not run there, and a table of the reasons at the end."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FORK = "forks, or imports fcntl or resource"
CHROMIUM = "needs Chromium, which the Python under Wine cannot start"
MAPPED = (
    "deletes or replaces a read-only file or one that is mapped into memory, which Windows denies"
)
NAMES = "uses names or bytes that Windows does not have"
KINDS = "makes pipes, devices or endless links, which Windows does not have"
CALLS = "observes calls of POSIX or of Python, which the package replaces there"
LINKS = "follows links, which Wine does not create as Windows does"
SIGNALS = "sends signals, or starts programs from a shell"
SHELL = "runs programs of Linux: bash, make, apt-get or uv"
INSTALLED = "needs this package to be installed, and not a clone on the path"
PACKAGES = "needs packages that are not set up there: Ray, nncf, Jupyter or Sphinx"
MODES = "sets permissions or limits of POSIX, which Windows does not have"
CHANGED = "needs the time at which a file was changed in any way, which Windows does not report"
WORDS = "expects an error of the system that Wine reports with other words, or not at all"
NOT_RUN = {
    "browser": CHROMIUM,
    "commands": SHELL,
    "concurrent": FORK,
    "container": SHELL,
    "demo": SHELL,
    "hostile": FORK,
    "install": SHELL,
    "interrupted": FORK,
    "label_sessions": FORK,
    "notebooks": PACKAGES,
    "page": CHROMIUM,
    "paths": MAPPED,
    "precision": PACKAGES,
    "ray": PACKAGES,
    "readme": SHELL,
    "report": CHROMIUM,
    "test_a_copy_of_a_classifier_is_independent_of_its_index": MAPPED,
    "test_a_fast_check_hashes_small_files_and_compares_sizes_of_large_ones": MAPPED,
    "test_a_fine_tuned_index_is_loaded_as_it_was_saved_and_its_files_are_copied_to_later_versions": MAPPED,
    "test_a_saved_or_pickled_index_gives_the_same_answers_bit_for_bit": MAPPED,
    "test_finetune_writes_a_new_index": MAPPED,
    "test_invalid_settings_are_refused_and_write_nothing": MAPPED,
    "test_reload_only_reads_changed_files": MAPPED,
    "test_sums_of_other_keys_are_detected": MAPPED,
    "test_without_an_index_no_label_is_guessed": MAPPED,
    "test_deployments_come_from_a_table": MAPPED,
    "test_add_warns_about_another_spelling_of_a_class": NAMES,
    "test_any_name_works_for_images_classes_and_tables": NAMES,
    "test_paths_are_read_from_standard_input": NAMES,
    "test_paths_on_standard_input_end_with_newlines_or_nuls_and_are_limited": NAMES,
    "test_other_kinds_of_file_are_refused_without_waiting": KINDS,
    "test_a_file_that_is_replaced_by_a_pipe_is_refused": KINDS,
    "test_system_errors_are_passed_on": KINDS,
    "test_a_sidecar_that_cannot_be_changed_is_skipped_with_one_line": KINDS,
    "test_a_path_that_is_not_a_source_is_refused_with_the_reason": KINDS,
    "test_the_command_writes_keywords_corrects_them_and_restores_the_bytes": NAMES,
    "test_files_with_names_that_are_not_utf8_can_be_read": NAMES,
    "test_two_folders_with_the_same_printed_name_are_refused": NAMES,
    "test_heic_photos_are_read_with_an_extra_that_errors_mention": INSTALLED,
    "test_broken_and_circular_links_in_a_folder_are_skipped": LINKS,
    "test_folders_of_any_depth_are_created": NAMES,
    "test_read_reports_why_a_path_is_not_a_file": KINDS,
    "test_find_descends_1500_folders": NAMES,
    "test_a_build_and_an_add_open_each_file_of_a_feature_table_once": CALLS,
    "living": MAPPED,
    "test_near_copies_name_each_other_and_photos_that_are_gone_can_be_relabelled": MAPPED,
    "test_a_photo_of_the_session_is_not_kept_twice": MAPPED,
    "test_an_invalid_table_is_refused_in_one_line_and_changes_nothing": MAPPED,
    "test_an_encoded_table_contains_the_features_of_readable_images": NAMES,
    "test_dropped_photos_are_shown_labelled_counted_and_finished": LINKS,
    "test_writing_to_a_link_replaces_its_target": LINKS,
    "test_circular_links_are_resolved": LINKS,
    "test_files_and_links_to_files_are_read": LINKS,
    "test_the_items_of_an_image_folder_are_its_files": LINKS,
    "test_a_session_is_finished_with_copies_links_moved_photos_or_the_labelled_ones": LINKS,
    "test_a_killed_session_keeps_its_labels_and_a_stopped_one_names_the_file_of_the_others": SIGNALS,
    "test_a_cache_that_cannot_be_used_is_refused_or_replaced_by_a_warning": KINDS,
    "test_an_unwritable_output_is_named": KINDS,
    "test_files_of_the_kernel_are_refused": KINDS,
    "test_few_of_many_parts_are_open_at_a_time": CALLS,
    "test_a_broken_docstring_reference_is_reported": PACKAGES,
    "test_a_killed_run_is_completed_by_the_next": SIGNALS,
    "test_paths_in_a_table_are_relative_to_its_folder": NAMES,
    "test_lone_surrogates_in_names_are_escaped": NAMES,
    "test_a_damaged_file_is_skipped_like_a_broken_photo": KINDS,
    "test_a_file_of_photos_is_sorted_once_and_restored": LINKS,
    "test_a_source_by_its_scheme_is_labelled_served_added_audited_and_searched": SIGNALS,
    "test_a_closed_standard_error_changes_nothing": SHELL,
    "test_a_full_or_closed_standard_stream_gives_one_line": SHELL,
    "test_a_reader_that_stops_early_causes_no_error": SHELL,
    "test_libraries_print_nothing": SHELL,
    "test_gc_deletes_photos_that_only_deleted_versions_use": LINKS,
    "test_building_from_cached_encodings_imports_no_model": LINKS,
    "test_a_class_folder_that_is_a_link_is_refused": LINKS,
    "test_photos_are_sorted_and_undo_restores_them[link]": LINKS,
    "test_sorting_links_or_into_the_same_folder_loses_nothing": LINKS,
    "test_class_folders_are_read_in_name_order": NAMES,
    "test_a_labelling_session_keeps_one_version_per_minute_and_its_readers_can_finish[folder]": MAPPED,
    "test_test_labels_cannot_reach_the_search": LINKS,
    "test_nothing_is_written_through_links_out_of_the_folder": LINKS,
    "test_an_image_replaced_by_another_photo_a_pipe_a_link_or_a_folder_is_not_found": KINDS,
    "test_an_output_pipe_is_written_to_and_not_replaced": KINDS,
    "test_an_index_opened_before_a_fork_is_refused": FORK,
    "test_a_local_server_creates_and_prints_a_token": SIGNALS,
    "test_clients_see_no_error_while_the_index_changes_and_the_server_stops": SIGNALS,
    "test_ctrl_c_interrupts_a_query": SIGNALS,
    "test_an_interrupt_during_imports_prints_one_line": SIGNALS,
    "test_a_clock_that_is_ahead_deletes_no_file_that_another_process_is_writing": SIGNALS,
    "test_weights_are_not_drawn_since_a_checkpoint_must_contain_them_all": MAPPED,
    "test_a_model_without_two_towers_is_refused": MAPPED,
    "test_the_server_loads_new_versions_but_not_damaged_ones": MAPPED,
    "test_another_index_can_replace_the_folder": MAPPED,
    "test_damage_of_any_file_of_any_version_is_refused_by_name": MAPPED,
    "test_a_session_goes_on_if_joining_fails": MAPPED,
    "test_disk_errors_leave_no_temporary_files": MAPPED,
    "test_indexes_are_renamed_duplicated_and_deleted": MAPPED,
    "test_names_and_numbers_of_indexes_are_checked": MAPPED,
    "test_an_index_that_holds_photos_of_another_is_neither_renamed_nor_deleted": MAPPED,
    "test_paths_with_any_characters_can_be_sorted_again_and_undone": NAMES,
    "test_query_and_load_work_with_any_folder_name": NAMES,
    "test_a_folder_without_an_index_is_refused": NAMES,
    "test_labels_become_safe_folder_names_or_are_refused": NAMES,
    "test_file_permissions_follow_the_umask": MODES,
    "test_a_place_that_cannot_contain_an_index_is_left_unchanged": MODES,
    "test_photos_that_cannot_be_moved_or_restored_are_skipped": MODES,
    "test_an_unreadable_manifest_is_not_overwritten_by_a_first_version": CALLS,
    "test_bad_uploads_are_refused_and_memory_stays_bounded": MODES,
    "test_on_macos_two_openmp_runtimes_are_allowed_and_faiss_has_one_thread": CALLS,
    "test_oversized_headers_are_refused": WORDS,
    "test_bad_indexes_ports_and_options_are_refused": WORDS,
    "test_without_scikit_learn_one_line_says_what_to_install": INSTALLED,
    "test_install_commands_work_where_this_package_is_installed": INSTALLED,
    "test_install_commands_suit_uv_and_clones_on_the_path": INSTALLED,
    "test_an_exception_during_a_write_leaves_the_folder_unchanged": MAPPED,
    "test_settings_that_cannot_be_serialised_are_not_written": MAPPED,
    "test_a_driver_too_old_for_torch_is_explained_once_and_a_missing_or_hidden_gpu_is_not": KINDS,
    "test_a_model_is_remembered_until_one_of_its_files_changes": CHANGED,
    "test_without_obstore_the_error_explains_how_to_install_it": INSTALLED,
}
"""Test files, or names of tests or of their cases in other files, and why they do not run."""


class Slashed(type(Path())):
    """A path that prints like the paths of the package, with forward slashes."""

    def __str__(self):
        return super().__str__().replace("\\", "/")


def pytest_configure():
    """Let tests compare paths below their temporary folders with paths that the package prints."""
    native = pytest.TempPathFactory.getbasetemp
    pytest.TempPathFactory.getbasetemp = lambda factory: Slashed(native(factory))


outcomes = defaultdict(set)
"""The outcomes of the cases of each test function, with the reasons of those that were skipped."""


def pytest_ignore_collect(collection_path):
    return collection_path.stem.removeprefix("test_") in NOT_RUN or None


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := NOT_RUN.get(item.name) or NOT_RUN.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_logreport(report):
    function = report.nodeid.partition("[")[0]
    if report.skipped:
        outcomes[function].add(str(report.longrepr[2]).removeprefix("Skipped: "))
    elif report.failed or report.when == "call":
        outcomes[function].add(report.outcome)


def pytest_terminal_summary(terminalreporter):
    """Print the number of test functions that passed, failed, or did not run, by reason."""
    table = Counter()
    for seen in outcomes.values():
        ran = seen & {"failed", "passed"}
        table[min(ran) if ran else min(seen)] += 1  # failed, if any case has
    for name, reason in NOT_RUN.items():
        file = Path(__file__).with_name(f"test_{name}.py")
        if file.exists():
            table[reason] += len(re.findall(r"^def test_", file.read_text("utf-8"), re.MULTILINE))
    terminalreporter.write_line(f"{table.total()} test functions:")
    for reason, number in table.most_common():
        terminalreporter.write_line(f"{number:5} {reason}")
