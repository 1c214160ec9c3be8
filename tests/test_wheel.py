"""The wheel holds all that a run needs, and works where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tclib.support.places import CHECKOUT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHECKOUT is None, reason="only a checkout can be built"),
]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy of it without a package index."""
    assert CHECKOUT is not None
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        shutil.copy(CHECKOUT / name, tree)
    unwanted = shutil.ignore_patterns("__pycache__", "reference", "runs", ".ipynb_checkpoints")
    for name in ("tclib", "notebooks", "data"):
        shutil.copytree(CHECKOUT / name, tree / name, ignore=unwanted)
    stale = tree / "build" / "lib" / "tclib" / "stale.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    pip("wheel", str(tree), "--no-deps", "--no-build-isolation", "-w", str(tree / "out"))
    (built,) = (tree / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def python(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in folder `cwd`, with the installed package and not the checkout on its path."""
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def run_code(site: Path, cwd: Path, code: str) -> list[str]:
    done = python(site, cwd, "-c", code)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_wheel_carries_each_asset_once_and_nothing_else(wheel: Path) -> None:
    assert CHECKOUT is not None
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assets = {name.removeprefix("tclib/assets/") for name in names if "/assets/" in name}
    patterns = ("notebooks/*.ipynb", "notebooks/presets/*", "data/demo/*/*", "data/paper/*")
    expected = {
        str(path.relative_to(CHECKOUT)) for pattern in patterns for path in CHECKOUT.glob(pattern)
    }
    assert assets == expected
    assert {"tclib/py.typed", "tclib/text/world_words.json"} <= set(names)
    assert "tclib/stale.py" not in names
    code = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "tclib").rglob("*.py")}
    assert code == {name for name in names if name.endswith(".py")}
    assert all(name.startswith(("tclib/", "tclib-")) for name in names)


def test_the_installed_package_finds_its_assets_and_runs_here(site: Path, tmp_path: Path) -> None:
    lines = run_code(
        site,
        tmp_path,
        "import tclib\n"
        "from tclib.models.language_model import LanguageModel\n"
        "from tclib.replication.paper import paper_table\n"
        "from tclib.replication.presets import load_preset\n"
        "from tclib.support.steps import current_commit\n"
        "print(tclib.__file__)\n"
        "print(load_preset('demo').folder)\n"
        "print(len(paper_table('fig3_pythia410m')))\n"
        "print(current_commit())\n"
        "for name in ('demo', 'demo-neox'):\n"
        "    print(LanguageModel.load(name).n_layers)\n",
    )
    assert lines[0] == str(site / "tclib" / "__init__.py")
    assert lines[1:] == [str(tmp_path / "runs" / "demo"), "9", "None", "4", "4"]
    assert not list(tmp_path.iterdir())


def test_a_strangers_repository_gives_no_commit(site: Path, tmp_path: Path) -> None:
    tree = tmp_path / "theirs"
    shutil.copytree(site / "tclib", tree / "tclib", ignore=shutil.ignore_patterns("assets"))
    for name in ("notebooks", "data/demo"):
        (tree / name).mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    code = "from tclib.support import places, steps; print(places.CHECKOUT, steps.current_commit())"
    assert run_code(tree, tmp_path, code) == ["None None"]
    (tree / "pyproject.toml").touch()  # an unpacked archive within another repository
    assert run_code(tree, tmp_path, code) == [f"{tree} None"]


def test_the_commands_of_the_installed_package(site: Path, tmp_path: Path) -> None:
    assert CHECKOUT is not None

    def tclib(*arguments: str) -> subprocess.CompletedProcess[str]:
        return python(site, tmp_path, "-m", "tclib.cli", *arguments)

    assert tclib("--version").stdout.startswith("tclib 0.")
    assert "demo-neox" in tclib("presets").stdout
    copied = tclib("notebooks")
    assert copied.returncode == 0, copied.stderr
    mine = tmp_path / "notebooks"
    for pattern in ("*.ipynb", "presets/*.yaml"):
        originals = {p.name: p.read_bytes() for p in (CHECKOUT / "notebooks").glob(pattern)}
        assert {p.name: p.read_bytes() for p in mine.glob(pattern)} == originals
    assert "0 files written" in tclib("notebooks").stdout
    (mine / "00_model_and_data.ipynb").write_text("mine")
    (mine / "presets" / "demo.yaml").unlink()
    refused = tclib("notebooks")
    assert refused.returncode == 2
    assert "00_model_and_data.ipynb would be overwritten" in refused.stderr
    assert (mine / "00_model_and_data.ipynb").read_text() == "mine"
    assert not (mine / "presets" / "demo.yaml").exists()
    assert tclib("notebooks", "elsewhere/nb").returncode == 0
    assert len(list((tmp_path / "elsewhere" / "nb").glob("*.ipynb"))) == len(
        list((CHECKOUT / "notebooks").glob("*.ipynb"))
    )
