"""Another version of Tidegate: this one's source with the layout of tracked flows changed.

Another order of members, one more, and the names of the maps that hold them raised by one, as
CONTRIBUTING asks; where it is asked for, objects of the desired state of a format of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHANGED = {
    "types.h": [
        ("\t__u32 seen;  /*", "\t__u64 news;\n\t__u32 MOVED; /*"),
        ("\t__u32 flags; /* enum tg_ct_flags */", "\t__u32 seen;"),
        ("__u32 MOVED;", "__u32 flags;"),
        ("TG_SIZE(struct tg_ct, 128)", "TG_SIZE(struct tg_ct, 136)"),
        ("TG_SIZE(struct tg_half_open, 168)", "TG_SIZE(struct tg_half_open, 176)"),
        ("TG_SIZE(struct tg_half_open_set, 672)", "TG_SIZE(struct tg_half_open_set, 704)"),
    ],
}
RENAMED = (
    ("ct_v2", "ct_v3"),
    ("answered_v1", "answered_v2"),
    ("half_open_v2", "half_open_v3"),
)
LOADER_PARTS = ("crds", "datapath", "node-loader")
FORMAT = 9
"""No version of ours has got so far."""


def compile_object(
    source: Path, target: Path, include: Path = ROOT / "datapath" / "include"
) -> None:
    machine = subprocess.run(
        ["gcc", "-print-multiarch"], check=True, capture_output=True, text=True
    ).stdout.strip()
    command = ["clang-19", "-O2", "-g", "-target", "bpf", "-mcpu=v3", f"-I{include}"]
    command += [f"-I/usr/include/{machine}", "-c", str(source), "-o", str(target)]
    subprocess.run(command, check=True)


def other_layout(root: Path, parts: Iterable[str] = LOADER_PARTS) -> None:
    """Makes a source tree at `root` of these parts, its objects compiled."""
    for part in parts:
        skipped = shutil.ignore_patterns("build", "__pycache__")
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, root / part, ignore=skipped)
        else:
            shutil.copy(ROOT / part, root / part)
    include = root / "datapath" / "include"
    for name, edits in CHANGED.items():
        path = include / "tidegate" / name
        text = path.read_text()
        for before, after in edits:
            assert text.count(before) == 1, before
            text = text.replace(before, after)
        path.write_text(text)
    for path in [*(root / "datapath").rglob("*.[ch]"), *root.rglob("*.py")]:
        text = path.read_text()
        for before, after in RENAMED:
            text = text.replace(f"{before} ", f"{after} ").replace(f"&{before}", f"&{after}")
            text = text.replace(f'"{before}"', f'"{after}"')
        path.write_text(text)
    built = root / "datapath" / "build"
    built.mkdir()
    for source in sorted((root / "datapath").glob("*.bpf.c")):
        compile_object(source, built / f"{source.name.partition('.')[0]}.o", include)


def other_format(root: Path) -> None:
    """The operator of this tree writes all objects in FORMAT; its loader reads that, too."""
    for name, pattern, text in (
        ("crds/tidegate_api/state.py", r"^((?:NEWEST_)?FORMAT) = \d+$", rf"\1 = {FORMAT}"),
        (
            "node-loader/tidegate_loader/local.py",
            r"^(READS_FORMATS) = .*$",
            rf"\1 = (1, 2, {FORMAT})",
        ),
    ):
        path = root / name
        changed, count = re.subn(pattern, text, path.read_text(), flags=re.MULTILINE)
        assert count, name
        path.write_text(changed)
