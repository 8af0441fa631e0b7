"""The documents are true: what they show runs, what they name exists, and their links lead somewhere.

Python blocks of a page run in order, in one namespace; commands run as they are typed. Every page has a
working folder of its own with small models and a little data, so that paths can be like `runs/exits/model`.
A comment above a block tells what is different here:

    <!-- test: --tiny -->            the block's commands get these arguments too, to be short
    <!-- test: with these edits -->  the block runs in a copy of the package with the `edit` blocks above it
    <!-- not run: installs ... -->   the block stays as it is, for one of `REASONS`
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import pytest

import elastic_lm as el
from elastic_lm import hf
from elastic_lm.checkpoints.native import save_model
from elastic_lm.cli.main import build_parsers, main
from elastic_lm.files.recipes import recipe_names, split_argument
from elastic_lm.hf.registry import FAMILIES
from elastic_lm.models.registry import init_params as init_encoder
from elastic_lm.models.task_heads import attach_task_exits
from elastic_lm.train import registry
from elastic_lm.train.recipes import load_config

ROOT = pathlib.Path(__file__).parent.parent
SITE = ROOT / "docs"
REPOSITORY = "https://github.com/elastic-lm/elastic_lm"
COLAB = "https://colab.research.google.com/github/elastic-lm/elastic_lm/blob/main/"

PAGES = [ROOT / "README.md", *sorted(SITE.rglob("*.md"))]
DOCUMENTS = [*PAGES, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"))]
DOCUMENTS += [ROOT / "configs" / "README.md"]

LANGUAGES = ("python", "sh", "text", "json", "edit", "bash")  # bash: whole scripts, see test_launch.py
REASONS = (
    *("installs", "downloads", "runs the tests", "needs a GPU", "needs a TPU", "needs several devices"),
    *("needs four devices", "needs two machines", "needs a cluster", "needs a bucket", "needs a server"),
)
FACES = ("", "cascade", "data", "depth", "evaluate", "hf", "testing", "train", "width")

# What a page may say instead of arguments: runs of two steps, on texts and on labelled records.
STEPS = ("steps=2", "warmup=1", "eval_every=0", "eval_batches=1", "save_every=2")
SHORT_RUN = tuple(f"--config.train.{option}" for option in STEPS)
ARGUMENTS = {
    "a short run on text": (*SHORT_RUN, "--config.data.seq_len=32", "--config.data.batch_size=2"),
    "a short run on records": (*SHORT_RUN, "--config.task.batch_size=8"),
}


WITH_EDITS = "with these edits"


# The quickstart runs once, for all pages.
QUICKSTART = ["elastic-lm", "quickstart", "--tiny"]


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# What a page shows.


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: pathlib.Path
    line: int  # of its first line of code
    language: str
    code: str
    arguments: tuple[str, ...] = ()  # that its commands get too
    reason: str = ""  # why it does not run here; "" = it does
    edited: bool = False  # runs with the edits that the page shows, in a copy of the package

    @property
    def place(self) -> str:
        """For messages."""
        return f"{name_of(self.page)}:{self.line}"


FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (test|not run): (.*?) -->\s*$")


def blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(text):
        line = text.count("\n", 0, fence.start()) + 2
        comment = COMMENT.search(text[: fence.start()])
        kind, value = comment.groups() if comment else ("", "")
        found.append(
            Block(
                page=page,
                line=line,
                language=fence[2],
                code=textwrap.dedent(fence[3]),
                arguments=ARGUMENTS.get(value, tuple(shlex.split(value))) if kind == "test" else (),
                reason=value if kind == "not run" else "",
                edited=value == WITH_EDITS,
            )
        )
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, as words."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield [*words, *block.arguments]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_marked_as_they_should_be(page: pathlib.Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block.place
        assert not block.reason or block.reason.startswith(REASONS), block.place
        assert not block.arguments or block.edited or block.language == "sh", block.place
        if block.language == "json":
            json.loads(block.code)


# The working folder of a page.


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Small models and a little data under the names that the pages use."""
    folder = tmp_path_factory.mktemp("workshop")
    assert main([*QUICKSTART[1:], "--out", str(folder / "runs" / "quickstart")]) == 0
    write_decoders(folder)
    write_task_models(folder)
    write_data(folder / "data")
    return folder


def write_decoders(folder: pathlib.Path) -> None:
    """Eight narrow layers, with the embedded model's vocabulary: as a user's, with exits, and elastic."""
    tokenizer = el.Tokenizer.load(el.embedded_model())
    shape = {"vocab_size": 512, "d_model": 24, "n_layers": 8, "n_heads": 6, "n_kv_heads": 2, "d_mlp": 64}
    config = el.testing.tiny_config(**shape, max_len=1024, tied=True, bos_id=0, eos_ids=(0,))
    params = el.testing.random_params(config, scale=0.1)
    hf.export(config, params, folder / "models" / "my-model", tokenizer)

    exits = [el.ExitConfig(layer, "norm") for layer in (6,)]
    with_exits = el.attach_exits(config, params, exits, jax.random.key(0))
    save_model(folder / "runs" / "exits" / "model", *with_exits, tokenizer)

    elastic = dataclasses.replace(config, elastic_groups=16)
    menu = el.Menu(heads=(1 / 3, 2 / 3, 1.0))
    save_model(folder / "runs" / "elastic" / "model", elastic, params, tokenizer, menu=menu)


def write_task_models(folder: pathlib.Path) -> None:
    """An encoder, one with a task head and an exit, one with a task head alone, and a T5."""
    tokenizer = el.data.train_bpe(["a good film", "a bad film"], 280)
    config = el.EncoderConfig(
        vocab_size=280, d_model=16, n_layers=4, n_heads=2, d_mlp=32, max_len=64, n_labels=2
    )
    params = jax.tree.map(lambda x: 8 * x, init_encoder(config, jax.random.key(0)))
    save_model(folder / "runs" / "super" / "model", config, params, tokenizer)
    both = attach_task_exits(config, params, (2,))
    save_model(folder / "runs" / "both" / "model", *both, tokenizer)

    small = dataclasses.replace(config, n_layers=2)
    drawn = jax.tree.map(lambda x: 8 * x, init_encoder(small, jax.random.key(2)))
    save_model(folder / "runs" / "swift" / "model", small, drawn, tokenizer)

    bare = dataclasses.replace(config, n_labels=0)
    hf.export(bare, init_encoder(bare, jax.random.key(3)), folder / "models" / "my-encoder", tokenizer)


def write_data(folder: pathlib.Path) -> None:
    """Text, prompts, and labelled records of short sentences."""
    rng = random.Random(0)
    lines = [f"def f{i}(x):\n    return x * {i} + {rng.randrange(100)}\n\n" for i in range(400)]
    (folder / "glue").mkdir(parents=True)
    (folder / "train.txt").write_text("".join(lines))
    (folder / "held_out.txt").write_text("".join(lines[200:]))
    (folder / "prompts.txt").write_text("def main():\nimport os\n")

    def write(name: str, records: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    write("held_out.jsonl", [{"text": "".join(lines[i : i + 4])} for i in range(0, 160, 4)])
    write("questions.jsonl", [{"text": line, "choices": ["ab", "cd"], "label": 1} for line in lines[:16]])
    labels = [rng.randrange(2) for _ in range(64)]
    words = [rng.choice(["a", "the", "one"]) + " " + ("bad", "good")[label] + " film" for label in labels]
    records = [{"sentence": text, "label": label} for text, label in zip(words, labels, strict=True)]
    for name in ("glue/glue_sst2_train.jsonl", "glue/glue_sst2_dev.jsonl", "val.jsonl"):
        write(name, records)
    write("in.jsonl", [{"sentence": text} for text in words])
    pairs = [{"en": text, "de": text[::-1]} for text in words]
    for name in ("multi30k_train.jsonl", "multi30k_val.jsonl"):
        write(name, pairs)


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a page registers is forgotten after it."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    families = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(families)


# Running it.


@pytest.mark.long
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
@pytest.mark.usefixtures("own_registries")
def test_what_a_page_shows_runs(
    page: pathlib.Path, workshop: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(workshop, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason:
            continue
        if block.edited:
            edits = [other.code for other in blocks(page) if other.language == "edit"]
            run_in_edited_copy(block.code, edits, tmp_path / "edited")
        elif block.language == "python":
            run_python(block.code, block.place, namespace)
        elif block.language == "sh":
            for words in commands(block):
                if words != QUICKSTART:
                    run_command(words, block.place)


def run_python(code: str, place: str, namespace: dict[str, Any]) -> None:
    page, line = place.rsplit(":", 1)
    # Empty lines in front give tracebacks the lines of the page.
    exec(compile("\n" * (int(line) - 1) + code, page, "exec"), namespace)


def run_command(words: list[str], place: str) -> None:
    """Runs `elastic-lm` in this process, which keeps compiled programs, and anything else in its own."""
    if words[0] == "elastic-lm":
        assert main(words[1:]) == 0, f"{place}: {shlex.join(words)}"
    else:
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(words, check=True, env={**os.environ, "PATH": path})


def run_in_edited_copy(code: str, edits: list[str], folder: pathlib.Path) -> None:
    """Runs code with a copy of the package in which every edit was made, in a process of its own."""
    shutil.copytree(ROOT / "elastic_lm", folder / "elastic_lm", ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        file, *lines = edit.splitlines()
        old, new = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in ("-", "+"))
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file}: {old}"
        (folder / file).write_text(text.replace(old, new))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=folder)


# Examples in docstrings.


def public_names() -> dict[str, Any]:
    """Classes and functions of the faces, under the shortest of their names."""
    names: dict[str, Any] = {}
    for room in FACES:
        face = importlib.import_module(f"elastic_lm.{room}" if room else "elastic_lm")
        for name in face.__all__:
            found = getattr(face, name)
            code = inspect.isclass(found) or inspect.isfunction(found)
            if code and not any(found is other for other in names.values()):
                names[f"el.{room}.{name}" if room else f"el.{name}"] = found
    return names


def examples(name: str, found: Any) -> dict[str, str]:
    """The code of the examples of a class with its methods, or of a function, by place."""
    documented = {name: found}
    if inspect.isclass(found):
        documented |= {f"{name}.{own}": value for own, value in vars(found).items() if own[0] != "_"}
    codes = {}
    for place, value in documented.items():
        _, example, text = (inspect.getdoc(value) or "").partition("Example:\n")
        if example:
            codes |= {f"{place}-{i}": textwrap.dedent(f[3]) for i, f in enumerate(FENCE.finditer(text))}
    return codes


NAMES = public_names()
EXAMPLES = {place: code for name, found in NAMES.items() for place, code in examples(name, found).items()}


@pytest.mark.long
@pytest.mark.parametrize("place", EXAMPLES)
@pytest.mark.usefixtures("own_registries")
def test_an_example_runs(place: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[place], place, "exec"), {"__name__": "__main__"})
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_every_public_name_has_an_example() -> None:
    assert not [name for name in NAMES if f"{name}-0" not in EXAMPLES]


SHOWN = {block.place: block.code for page in PAGES for block in blocks(page) if block.language == "python"}


@pytest.mark.parametrize("place", [*SHOWN, *EXAMPLES])
def test_what_is_shown_imports_faces_alone(place: str) -> None:
    for node in ast.walk(ast.parse({**SHOWN, **EXAMPLES}[place])):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            assert all(name == "elastic_lm" or not name.startswith("elastic_lm") for name in modules)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("elastic_lm"):
            listed = importlib.import_module(str(node.module)).__all__
            assert {alias.name for alias in node.names} <= set(listed), ast.unparse(node)


# What documents name.


INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(r"(?:configs|tests|elastic_lm|experiments|colab|docs)/[\w./]*\w")
HOSTS = ("arxiv.org", "keepachangelog.com", "semver.org", "docs.python.org", "github.com")


def prose(page: pathlib.Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_codes(page: pathlib.Path) -> list[str]:
    return [code.replace("\\|", "|") for code in INLINE.findall(prose(page))]


def anchors(page: pathlib.Path) -> set[str]:
    titles = HEADING.findall(prose(page))
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def target_of(page: pathlib.Path, link: str) -> pathlib.Path | None:
    """The file of the repository that a link leads to; None = another site."""
    for prefix in (COLAB, f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/"):
        if link.startswith(prefix):
            return ROOT / link.removeprefix(prefix)
    return None if link.startswith("https://") else (page.parent / link if link else page)


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    for link in LINK.findall(INLINE.sub("", prose(page))):
        path, _, anchor = link.partition("#")
        target = target_of(page, path)
        if target is None:
            known = path.startswith(REPOSITORY) or path.split("/")[2] in HOSTS
            assert known, f"{link}: add its host to HOSTS if it is meant"
            assert "arxiv.org" not in path or re.fullmatch(r"https://arxiv.org/abs/\d{4}\.\d{5}", path), link
        else:
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [p for p in DOCUMENTS if p.stem != "CHANGELOG"], ids=name_of)
def test_names_and_files_exist(page: pathlib.Path) -> None:
    for code in inline_codes(page):
        if name := re.match(r"el((?:\.\w+)+)", code):
            found: Any = el
            for part in name[1].split(".")[1:]:
                found = getattr(found, part)
        if path := PATH.match(code):
            assert (ROOT / path[0]).exists(), code


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_commands_in_sentences_are_understood(
    page: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for code in inline_codes(page):
        if not code.startswith("elastic-lm ") or " --" not in code or "COMMAND" in code or "..." in code:
            continue
        parser, _ = build_parsers()
        flags, rest = parser.parse_known_args(shlex.split(code)[1:])
        if flags.command != "train":
            assert not rest, code
        elif flags.config is None:
            assert flags.gin_file or flags.gin_param, code
        elif split_argument(flags.config)[0] in recipe_names():
            load_config(flags.config, rest)


# What documents list.


def test_the_architecture_shows_the_rooms_and_their_order() -> None:
    from test_house import ORDER

    page = SITE / "architecture.md"
    (order,) = [block.code for block in blocks(page) if block.language == "text"]
    assert [set(line.split(", ")) for line in order.splitlines()] == ORDER
    rooms = re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)
    assert sorted(rooms) == sorted(itertools.chain(*ORDER))


def test_every_face_has_a_page() -> None:
    for room in FACES:
        page = SITE / "api" / f"{room or 'el'}.md"
        assert f"::: elastic_lm{room and '.'}{room}\n" in page.read_text()


def test_every_method_and_recipe_is_listed() -> None:
    text = (SITE / "configs.md").read_text()
    for name in registry.METHODS:
        assert f"| `{name}` |" in text
    for recipe in (ROOT / "configs").glob("*.py"):
        assert f"`configs/{recipe.name}`" in text
        assert f"({recipe.name})" in (ROOT / "configs" / "README.md").read_text()


def test_every_family_is_listed() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \|", (SITE / "families.md").read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert set(el.hf.FAMILIES) <= listed


def test_every_command_is_shown() -> None:
    text = (SITE / "cli.md").read_text()
    for name, parser in build_parsers()[1].items():
        actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for action in [f" {choice}" for a in actions for choice in a.choices] or [""]:
            assert f"## {name}{action}\n" in text
            assert f"<!-- flags: {name}{action} -->" in text


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
