"""Plugin for pytest on Windows: which tests do not run there, and a table of the reasons at the end."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

FORK = "forks, or imports fcntl or resource"
CHROMIUM = "needs Chromium, which the Python under Wine cannot start"
MAPPED = "deletes or replaces a file that is mapped into memory, which Windows denies"
NAMES = "uses names or bytes that Windows does not have"
SLASHES = "compares paths, whose separator differs"
SHELL = "runs programs of Linux: bash, make, apt-get or uv"
PACKAGES = "needs packages that are not set up there: Ray, onnxruntime, nncf or Jupyter"
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
    "onnx": PACKAGES,
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
    "test_any_name_works_for_images_classes_and_tables": NAMES,
    "test_paths_are_read_from_standard_input": NAMES,
    "test_paths_on_standard_input_end_with_newlines_or_nuls_and_are_limited": NAMES,
    "test_a_package_has_an_observation_for_each_photo": SLASHES,
    "test_a_label_of_a_session_reads_no_version": SLASHES,
    "test_a_session_saves_nothing_on_damage_and_everything_when_it_is_mended": SLASHES,
    "test_add_skips_known_features": SLASHES,
    "test_boxes_and_bursts_in_a_package": SLASHES,
    "test_detections_pass_through_and_animals_get_classes": SLASHES,
    "test_each_box_is_classified_as_its_own_photo": SLASHES,
    "test_each_photo_is_a_detection_with_its_best_classes": SLASHES,
    "test_exif_adds_the_time_and_the_place": SLASHES,
    "test_files_are_relative_to_the_folder_that_contains_all": SLASHES,
    "test_labels_come_back_from_label_studio": SLASHES,
    "test_only_empty_photos_are_a_valid_result": SLASHES,
    "test_photos_with_several_annotations": SLASHES,
    "test_times_before_standard_time_have_offsets_of_whole_minutes": SLASHES,
    "test_written_coco_is_read_back": SLASHES,
    "test_wrong_options_are_refused_in_one_line": SLASHES,
    "test_a_closed_standard_error_changes_nothing": SHELL,
    "test_a_full_or_closed_standard_stream_gives_one_line": SHELL,
    "test_a_reader_that_stops_early_causes_no_error": SHELL,
    "test_libraries_print_nothing": SHELL,
}
"""Test files, or names of tests in other files, and why they do not run."""

outcomes = defaultdict(set)
"""The outcomes of the cases of each test function, with the reasons of those that were skipped."""


def pytest_ignore_collect(collection_path):
    return collection_path.stem.removeprefix("test_") in NOT_RUN or None


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := NOT_RUN.get(item.originalname or item.name):
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
