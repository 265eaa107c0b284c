"""Keywords in XMP sidecars: other metadata survives, nothing is lost, and undo restores the bytes. Also a script."""

import json
import os
import shutil
import signal
import subprocess
from difflib import SequenceMatcher
from pathlib import Path
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape, quoteattr

import filelock
import killing
import pytest
from conftest import ROOT, few, json_rows, needs_real, ok, sampled, tries
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from referees import referee
from serving import caltech_photos

from retrieval_tip.errors import InputError
from retrieval_tip.plugins.xmp import documents as xmp
from retrieval_tip.plugins.xmp.documents import Keywords, merged
from retrieval_tip.plugins.xmp.sidecars import undo_sidecars, write_sidecars

RDF, DC = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://purl.org/dc/elements/1.1/}"
TIP, TREE = (
    "{urn:retrieval-tip:xmp/1.0/}",
    "{http://ns.adobe.com/lightroom/1.0/}hierarchicalSubject",
)
FULL = """\ufeff<?xml version='1.0' encoding='utf-8'?>
<?xpacket begin="\ufeff" id='W5M0MpCehiHzreSzNTczkc9d'?><!-- outside -->
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk = 'Söme > tool'>
  <r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><!-- inside -->
    <r:Description r:about='uuid:1' xmlns:xmp='http://ns.adobe.com/xap/1.0/' xmlns:odd="urn:odd"
       xmp:Rating="4" odd:a = "1&#10;2 > '" odd:b='"'  ><odd:c><![CDATA[<&]]>&#13;</odd:c><?odd pi?>
      <d:subject xmlns:d="http://purl.org/dc/elements/1.1/"><!-- list -->
        <r:Bag>
          <r:li>bird</r:li><!-- item -->
          <r:li odd:by="me">B&amp;W</r:li>
        </r:Bag>
      </d:subject>
    </r:Description>
  </r:RDF>
</x:xmpmeta>%s<?xpacket end='w'?>
""".replace("%s", " " * 99 + "\n").encode()


def count(written):
    """Return the number of photos in what a writer says."""
    return int(written.said.split()[-2])


def values(data, name=f"{DC}subject"):
    """Return the values of a list in a document, however they are given."""
    found = []
    for node in ET.fromstring(data).iter(f"{RDF}Description"):
        found += [node.get(name)] if name in node.attrib else []
        for one in node.findall(name):
            found += [item.text for item in one.iter(f"{RDF}li")] or [one.text]
    return [one for one in found if one and one.strip()]


def rest(data):
    """Return what a document says without its keywords and our own lists."""
    root = ET.fromstring(
        data, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True, insert_pis=True))
    )
    for node in root.iter(f"{RDF}Description"):
        node.attrib.pop(f"{DC}subject", None)
        for one in [*node]:
            if one.tag == f"{DC}subject" or str(one.tag).startswith(TIP):
                node.remove(one)
    return {
        (node.tag, *sorted(node.attrib.items()), (node.text or "").strip()) for node in root.iter()
    }


def test_only_keywords_are_added_and_every_other_byte_stays():
    new = merged(FULL, Keywords(["bird", "Löwe <1>"]))
    changes = SequenceMatcher(None, FULL, new, autojunk=False).get_opcodes()
    assert {change[0] for change in changes} == {"equal", "insert"}
    assert values(new) == ["bird", "B&W", "Löwe <1>"]
    assert (values(new, f"{TIP}keywords"), values(new, f"{TIP}keywordsBefore")) == (
        ["bird", "Löwe <1>"],
        ["bird"],
    )
    assert b'rdf:about="uuid:1"' in new
    assert merged(new, Keywords(["bird", "Löwe <1>"])) == new
    other = merged(new, Keywords(["fish"], ["animal|fish"]))
    assert values(other) == ["bird", "B&W", "fish"]
    assert values(other, TREE) == ["animal|fish"]
    assert values(merged(other, Keywords([]))) == ["bird", "B&W"]
    deep = FULL.replace(b"<?odd pi?>", b"<odd:d>" * 20_000 + b"</odd:d>" * 20_000)
    assert b"<r:li>fox</r:li>" in merged(deep, Keywords(["fox"]))
    assert merged(FULL, Keywords([])) == FULL
    assert merged(None, Keywords([])) is None


WORDS = st.lists(st.sampled_from(["a", "b", "c d", "<&>", "é"]), unique=True, max_size=4)
FORMS = {
    "bag": "<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>",
    "lines": "<dc:subject >\n  <rdf:Bag >\n   {items}\n  </rdf:Bag >\n </dc:subject>",
    "seq": "<dc:subject><rdf:Seq>{items}</rdf:Seq></dc:subject>",
    "empty": "<dc:subject><rdf:Bag/></dc:subject>",
    "text": "<dc:subject>{one}</dc:subject>",
    "none": "",
}
"""How other programs may write keywords, besides as an attribute."""
PLACES = (
    '<rdf:Description rdf:about=""{attribute}>{own}</rdf:Description>',
    "<rdf:Description{attribute}/>",
    "",
)


@given(
    st.sampled_from([*FORMS]),
    st.sampled_from(PLACES),
    st.booleans(),
    WORDS,
    st.lists(WORDS, max_size=4),
)
@tries(300)
def test_each_run_replaces_our_keywords_and_keeps_those_of_others(
    form, place, attribute, words, runs
):
    items = "".join(f"<rdf:li>{escape(one)}</rdf:li>" for one in words)
    nodes = place.format(
        attribute=f" dc:subject={quoteattr(words[0])}" if attribute and words else "",
        own=FORMS[form].format(items=items, one=escape(" ".join(words))),
    )
    spaces = f'xmlns:rdf="{RDF[1:-1]}" xmlns:dc="{DC[1:-1]}"'
    data = (f"<rdf:RDF {spaces}>{nodes}</rdf:RDF>" if nodes else f"<rdf:RDF {spaces}/>").encode()
    theirs = {*values(data)}
    written = False
    for wanted in runs:
        new = merged(data, Keywords(wanted))
        assert {*values(new)} == theirs | {*wanted}
        assert rest(new) >= rest(data)
        if wanted:
            assert len(ET.fromstring(new).findall(f".//{DC}subject/{RDF}Bag")) == 1
            assert (b":Seq" in new, b"dc:subject=" in new) == (False, False)
        elif written and not theirs:  # ExifTool reads an empty list as a keyword
            assert b"subject" not in new
        written = written or bool(wanted)
        assert written or new == data
        data = new


BOMB = b'<!DOCTYPE r [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><r>&b;</r>'
LATIN = b'<?xml version="1.0" encoding="latin1"?>' + FULL.partition(b"?>")[2]
UTF_16 = FULL.decode().replace("utf-8", "utf-16").encode("utf-16")
REFUSED = {
    "is not XML": [
        b"",
        b"<a",
        b"photo",
        b"<a/><b/>",
        b"\xff\xd8\xff",
        b"<a>&b;</a>",
        FULL[:-200],
        UTF_16,
    ],
    "DOCTYPE": [BOMB, FULL.replace(b"<x:xmpmeta", b"<!DOCTYPE x><x:xmpmeta", 1)],
    "convert it to UTF-8": [LATIN],
    "rdf:RDF": [b"<svg/>", FULL.replace(b"r:RDF", b"r:Other")],
    "form": [
        FULL.replace(b"r:Bag", b"r:Seq"),
        FULL.replace(b"r:Bag", b"odd:Bag"),
        FULL.replace(b"r:li", b"r:_1"),
    ],
    "elements": [FULL.replace(b"<?odd pi?>", b"<odd:d/>" * xmp.MOST_ELEMENTS)],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_documents_that_cannot_be_merged_are_refused(reason):
    for data in REFUSED[reason]:
        with pytest.raises(InputError, match=reason):
            merged(data, Keywords(["bird"]))


def given_(folder, **keywords):
    return {str(folder / f"{name}.jpg"): Keywords(own) for name, own in keywords.items()}


def state(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_the_sidecar_is_the_one_that_other_programs_would_read(tmp_path):
    for name in ("own.jpg", "both.jpg", "alone.jpg", "raw.jpg", "raw.cr2"):
        (tmp_path / name).touch()
    for name in ("both.xmp", "both.jpg.xmp", "alone.xmp", "raw.xmp"):
        (tmp_path / name).write_bytes(FULL)
    before = state(tmp_path)
    result = write_sidecars(given_(tmp_path, own=["fox"], both=["fox"], alone=["fox"], raw=["fox"]))
    changed = {name for name, data in state(tmp_path).items() if data != before.get(name)}
    assert (count(result), result.skipped) == (4, [])
    assert changed == {"own.jpg.xmp", "both.jpg.xmp", "alone.xmp", "raw.jpg.xmp"}
    assert count(undo_sidecars(given_(tmp_path, own=[], both=[], alone=[], raw=[]))) == 4
    assert state(tmp_path) == before


def test_undo_keeps_what_others_changed(tmp_path):
    (tmp_path / "b.jpg.xmp").write_bytes(FULL)
    photos = given_(tmp_path, a=["fox"], b=["fox"], c=["fox"], d=["fox"])
    write_sidecars(photos)
    edited = (tmp_path / "c.jpg.xmp").read_bytes().replace(b"fox", b"fuchs")
    (tmp_path / "c.jpg.xmp").write_bytes(edited)
    (tmp_path / "d.jpg.xmp").unlink()
    write_sidecars(
        given_(tmp_path, a=["cat"], b=[])
    )  # undo restores the state before the first run
    result = undo_sidecars(photos)
    assert (count(result), [one.source for one in result.skipped]) == (
        2,
        [str(tmp_path / f"{n}.jpg.xmp") for n in "c"],
    )
    assert state(tmp_path) == {"b.jpg.xmp": FULL, "c.jpg.xmp": edited}
    write_sidecars(given_(tmp_path, c=["cat"]))
    assert count(undo_sidecars(photos)) == 1
    assert state(tmp_path) == {"b.jpg.xmp": FULL, "c.jpg.xmp": edited}


def test_a_sidecar_that_cannot_be_changed_is_skipped_with_one_line(tmp_path, caplog):
    (tmp_path / "a.jpg.xmp").write_bytes(b" " * (4 << 20) + FULL)
    (tmp_path / "b.jpg.xmp").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "c.jpg.xmp")
    (tmp_path / "d.jpg.xmp").write_bytes(BOMB)
    (tmp_path / "e.jpg.xmp").mkdir()
    before = state(tmp_path)
    result = write_sidecars(given_(tmp_path, **{name: ["fox"] for name in "abcdef"}))
    assert (count(result), [one.source[-9] for one in result.skipped]) == (1, [*"abcde"])
    for one, reason in zip(
        result.skipped, ("at most", "link", "a pipe", "DOCTYPE", "a folder"), strict=True
    ):
        assert reason in one.reason
        assert f"{one}".count(one.source) == 1
        assert "\n" not in f"{one}"
    assert {name: data for name, data in state(tmp_path).items() if name != "f.jpg.xmp"} == before


def work(job, steps):
    """Write or undo in a process that the test kills."""
    steps.writes()
    steps.events("os.chmod", "os.utime")
    photos = given_(Path(job["folder"]), a=["fox"], b=["fox"], c=[])
    if job["undo"]:
        undo_sidecars(photos)
    else:
        write_sidecars(photos)


if __name__ == "__main__":
    killing.serve(work)
    raise SystemExit


@killing.needs_fork
@pytest.mark.parametrize("undo", [False, True], ids=["write", "undo"])
def test_a_run_killed_at_any_step_can_be_repeated_or_undone(server, encodings, tmp_path, undo):
    (encodings / "sidecars").mkdir(exist_ok=True)  # so that every run takes the same steps

    def start(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "b.jpg.xmp").write_bytes(FULL)
        (folder / "c.jpg.xmp").write_bytes(merged(FULL, Keywords(["cat"])))
        before = state(folder)
        if undo:
            write_sidecars(given_(folder, a=["dog"]))
            write_sidecars(given_(folder, a=["fox"], b=["fox"], c=[]))
        return folder, before

    folder, before = start("whole")
    assert server.run({"folder": str(folder), "undo": undo}) == 0
    expected = state(folder)
    number = len(server.steps)
    assert number > (10 if undo else 25)
    for step in sampled(number, 6):
        folder, _ = start(str(step))
        allowed = [{*before.values(), *state(folder).values()}, {*expected.values()}]
        assert server.run({"folder": str(folder), "undo": undo}, step=step) == -signal.SIGKILL
        assert {
            data for name, data in state(folder).items() if not name.endswith(".tmp")
        } <= set.union(*allowed)
        if step % 2 or undo:
            assert server.run({"folder": str(folder), "undo": undo}) == 0
            assert state(folder) == expected
        result = undo_sidecars(given_(folder, a=[], b=[], c=[]))
        assert (result.skipped, state(folder)) == ([], before)


def test_a_full_disk_changes_whole_sidecars_and_the_next_run_continues(tmp_path, monkeypatch):
    disk = killing.FullDisk(monkeypatch)
    for stop in few(range(1, 7), 6):
        disk.calls = 0
        disk.stop = stop
        folder = tmp_path / str(stop)
        folder.mkdir()
        (folder / "b.jpg.xmp").write_bytes(FULL)
        photos = given_(folder, a=["fox"], b=["fox"], c=["fox"])
        with pytest.raises(InputError, match=r"No space left[^\n]*$"):
            write_sidecars(photos)
        assert {*state(folder)} == {
            "b.jpg.xmp",
            *[f"{name}.jpg.xmp" for name in "abc"[: (stop - 1) // 2]],
        }
        disk.stop = 0
        assert write_sidecars(photos).skipped == []
        assert count(undo_sidecars(photos)) == 3
        assert state(folder) == {"b.jpg.xmp": FULL}


@needs_real
def test_the_command_writes_keywords_corrects_them_and_restores_the_bytes(
    shared, things, run, tmp_path
):
    index = shutil.copytree(things, tmp_path / "index")
    inbox = tmp_path / "new" / "odd\udcff"
    inbox.mkdir(parents=True)
    labels = ["accordion", "airplane", "anchor"]
    for label, (path, _) in zip(labels, caltech_photos(shared, "test", 3, 1), strict=True):
        shutil.copy(path, inbox / f"{label}.jpg")
    Image.new("RGB", (64, 64)).save(inbox / "black.png")
    (inbox / "broken.jpg").write_bytes(b"no photo")
    (inbox / "broken.jpg.xmp").write_bytes(merged(FULL, Keywords(["anchor"])))
    (inbox / "anchor.xmp").write_bytes(FULL)
    before = state(inbox)
    run("fit", index)

    def keywords(*options, status=3):
        done = run("classify", index, tmp_path / "new", "--format", "xmp", *options)
        assert done.exit_code == status, done.output
        return {path.name: values(path.read_bytes()) for path in inbox.glob("*.xmp")}, done

    found, done = keywords()
    right = {f"{label}.jpg.xmp": [label] for label in labels[:2]} | {
        "anchor.xmp": ["bird", "B&W", "anchor"]
    }
    right["broken.jpg.xmp"] = [
        "bird",
        "B&W",
        "anchor",
    ]  # a photo that cannot be read keeps its keywords
    assert found == right
    assert "Changed the keywords of 3 photos" in done.stdout
    assert keywords("--uncertain", "check")[0] == right | {"black.png.xmp": ["check"]}
    found, _ = keywords("--abstain", "1")
    assert (found["anchor.xmp"], found["black.png.xmp"]) == (["bird", "B&W"], [])
    (tmp_path / "groups.csv").write_text("class,kind\naccordion,instrument\nairplane,vehicle\n")
    ok("index set", index, "--groups", tmp_path / "groups.csv")
    keywords()
    for name, path in (("accordion.jpg.xmp", "instrument|accordion"), ("anchor.xmp", "anchor")):
        assert values((inbox / name).read_bytes(), TREE)[0] == path
    _, done = keywords("--undo", status=0)
    assert done.stdout == "Restored the keywords of 4 photos\n"
    assert state(inbox) == before
    boxes = [
        {"category": "1", "conf": 0.9, "bbox": bbox}
        for bbox in ([0, 0, 1, 1], [0.4, 0.4, 0.01, 0.01])
    ]
    entries = [
        {"file": "anchor.jpg", "detections": boxes},
        {"file": "airplane.jpg", "detections": []},
    ]
    entries.append({"file": "accordion.jpg", "detections": [boxes[0] | {"category": "2"}]})
    kinds = {"1": "animal", "2": "person"}
    (tmp_path / "boxes.json").write_text(
        json.dumps({"images": entries, "detection_categories": kinds})
    )
    boxes = ("--boxes", tmp_path / "boxes.json", "--categories", "animal")
    found, _ = keywords("--uncertain", "check", *boxes)
    rows = json_rows(run("classify", index, tmp_path / "new", *boxes, "--format", "json"))
    answers = [row["label"] for row in rows if row["no_match"] is False]
    assert {*found["anchor.xmp"]} >= {"bird", "B&W", *filter(None, answers)}
    assert found.keys() == {"anchor.xmp", "broken.jpg.xmp"}
    xmp = ("--format", "xmp")
    for wrong in (
        ["s3://bucket/a.jpg", *xmp],
        [inbox, *xmp, "-o", "x"],
        [inbox, "--undo"],
        [inbox, "--uncertain", "x"],
    ):
        assert run("classify", index, *wrong).exit_code == 2


def test_sidecars_on_a_read_only_disk_are_skipped(tmp_path, small_disk):
    disk = small_disk(256)
    (disk / "b.jpg.xmp").write_bytes(FULL)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    photos = given_(disk, a=["fox"], b=["fox"])
    result = write_sidecars(photos)
    assert (count(result), len(result.skipped)) == (0, 2)
    assert all("Read-only" in one.reason for one in result.skipped)
    assert (undo_sidecars(photos).skipped, state(disk)) == ([], {"b.jpg.xmp": FULL})


EXIFTOOL = "libimage-exiftool-perl", "13.25+dfsg-1"
WITH_EXIV2 = """
import json, pyexiv2, sys
path, change = json.load(sys.stdin)
with pyexiv2.Image(path) as photo:
    if change:
        photo.modify_xmp(change)
    print(json.dumps(photo.read_xmp()))
"""


def exiv2():
    """Return a function that changes a sidecar and reads it with Exiv2."""
    python = referee(("pyexiv2==2.16.0",))

    def ask(path, **change):
        line = json.dumps(
            [str(path), {f"Xmp.{name.replace('_', '.')}": value for name, value in change.items()}]
        )
        done = subprocess.run(
            [python, "-c", WITH_EXIV2], input=line, capture_output=True, text=True, check=True
        )
        return {
            name.removeprefix("Xmp.").lower(): value
            for name, value in json.loads(done.stdout).items()
        }

    return ask


def exiftool():
    """Return a function that changes a sidecar and reads it with ExifTool."""
    place = ROOT / "build/referees/exiftool"
    place.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place / "lock"):
        try:
            if not (place / "usr/bin/exiftool").exists():
                subprocess.run(
                    ["apt-get", "download", "=".join(EXIFTOOL)],
                    cwd=place,
                    check=True,
                    capture_output=True,
                )
                package = next(place.glob("*.deb"))
                subprocess.run(["dpkg", "-x", package, place], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"SKIPPED: no referee, ExifTool cannot be installed: {error}")
    program = ["perl", f"-I{place / 'usr/share/perl5'}", place / "usr/bin/exiftool"]

    def ask(path, **change):
        if change:
            values = {
                name: value if isinstance(value, str) else ";".join(value)
                for name, value in change.items()
            }
            tags = [f"-XMP-{name.replace('_', ':')}={value}" for name, value in values.items()]
            subprocess.run(
                [*program, "-q", "-overwrite_original", "-sep", ";", *tags, path], check=True
            )
        done = subprocess.run(
            [*program, "-j", "-G1", "-struct", "-XMP:all", path], capture_output=True, check=True
        )
        found = json.loads(done.stdout)[0]
        return {
            name.removeprefix("XMP-").replace(":", ".").lower(): value
            for name, value in found.items()
        }

    return ask


@pytest.mark.soak
@pytest.mark.parametrize("program", [exiv2, exiftool])
def test_other_programs_read_what_we_write_and_keep_what_they_wrote(program, tmp_path):
    ask = program()
    path = tmp_path / "a.jpg.xmp"

    def write(*own):
        assert write_sidecars({str(tmp_path / "a.jpg"): Keywords(*own)}).skipped == []
        return ask(path)

    flat, tree = "dc.subject", "lr.hierarchicalsubject"
    new = write(["Löwe & <x>", "bird"], ["animal|bird"])
    assert (new[flat], new[tree], new["tip.keywords"]) == (
        ["Löwe & <x>", "bird"],
        ["animal|bird"],
        new[flat],
    )
    theirs = {"xmp_Rating": "4", "dc_creator": ["Ä b"], "photoshop_Instructions": "1 < 2\n3"}
    before = ask(path, **theirs, dc_subject=["bird", "own", "fox"])
    after = write(["fox"])
    ours = {name for name in {*before, *after} if name in (flat, tree) or name.startswith("tip")}
    kept = [
        {name: value for name, value in found.items() if name not in ours}
        for found in (before, after)
    ]
    assert kept[0] == kept[1]
    assert str(after["xmp.rating"]) == "4"
    assert {*after[flat]} == {"own", "fox"}
    assert (b"rdf:Seq>\n     <rdf:li>own" in path.read_bytes(), tree in after) == (False, False)
    assert {*write([])[flat]} == {"own", "fox"}  # fox was there before
    assert count(undo_sidecars([str(tmp_path / "a.jpg")])) == 1
