"""`make docs`: the executed study as pages that open from a file, in docs/ (committed; GitHub Pages serves it).

    python workflow/render_docs.py embedded              # from data/results/embedded
    python workflow/render_docs.py --documents           # the documents and the reference alone, no study needed

Five notebooks with their outputs, an index that tells the story in one screen, the documents of docs/*.md, and the
reference of the public face from docstrings. Nothing is computed again, no page asks another host for anything.
Markdown and notebooks go through nbconvert; the frame around them is `docs_frame`.
"""

from __future__ import annotations

import argparse
import datetime
import html
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import docs_reference
from docs_frame import Frame, markdown_html, notebook_html
from headlines import cost, faster
from notebook_parameters import load_notebook, source_of
from result_tables import latency_table, refuse_unfinished, rows_of, run_name, scorer_table, stamps_of

from sdtp_lib.leaderboard.committed import every_committed
from sdtp_lib.leaderboard.opening import cost_beside_all_methods, on_a_gpu
from sdtp_lib.provenance import commit, origin_line, project_root
from sdtp_lib.records import atomic_write

NOTEBOOKS = ("01_saliency", "02_training", "03_pruning", "04_latency", "05_longbench")
# docs/<name>.md -> its title in the navigation; a guide that is not there has no page.
GUIDES = {"leaderboard": "Leaderboard", "results": "Results", "method": "Method", "support": "Models", "study": "Runs",
          "measurements": "Measurements", "slurm": "Clusters"}  # fmt: skip
PICTURES = {"dropped-tokens": "03_pruning_text", "speedup": "04_speedup"}
USE = """```python
from sdtp_lib import load_model, token_pruning

model, tokenizer = load_model("Qwen/Qwen2.5-7B-Instruct", dtype="bfloat16", device_map="auto")
inputs = tokenizer(long_prompt, return_tensors="pt").to(model.device)
with token_pruning(model, "2x") as trace:          # or "keep08", 0.8, a PruningConfig, a method
    output = model.generate(**inputs, max_new_tokens=128)
print(trace)                                       # tokens in and left, FLOPs and KV cache saved
```"""


def build(run: Path, docs: Path) -> list[Path]:
    """Write every page; the files written.

    Raises
    ------
    FileNotFoundError
        If a notebook of the run is not finished, or its executed copy is not there or holds an error.
    """
    refuse_unfinished(run)
    executed = {name: _executed(run, name) for name in NOTEBOOKS}
    rows = rows_of(run)
    titles = {name: _title(path) for name, path in executed.items()}
    (docs / "pictures").mkdir(parents=True, exist_ok=True)
    for name, source in PICTURES.items():
        shutil.copyfile(run / f"{source}.png", docs / "pictures" / f"{name}.png")
    frame, models, explorer = _frame(docs), every_committed(docs.parent), (docs / "explorer.html").is_file()
    pages = {f"{name}.html": (titles[name], notebook_html(path, explorer=explorer)) for name, path in executed.items()}
    pages["index.html"] = (
        "SDTP: token pruning in prefill",
        index(rows, titles, dict(frame.navigation), on_a_gpu(models, ""), cost_beside_all_methods(models, "")),
    )
    (docs / ".nojekyll").touch()  # GitHub Pages serves the files as they are
    return _written(pages, frame, docs) + documents(docs)


def documents(docs: Path) -> list[Path]:
    """Write the pages that need no study: the documents of docs/*.md and the reference; the files written."""
    frame = _frame(docs)
    # Other models' leaderboards are reached from the first one.
    others = {path.stem: f"Leaderboard, {path.stem.removeprefix('leaderboard-')}" for path in
              sorted(docs.glob("leaderboard-*.md"))}  # fmt: skip
    pages = {}
    for name, title in (_guides(docs) | others).items():
        text = _with_pictures((docs / f"{name}.md").read_text(encoding="utf-8"), docs)
        pages[f"{name}.html"] = title, markdown_html(text)
    pages["reference.html"] = "Reference", markdown_html(docs_reference.markdown())
    return _written(pages, frame, docs)


def _guides(docs: Path) -> dict[str, str]:
    return {name: title for name, title in GUIDES.items() if (docs / f"{name}.md").is_file()}


def _frame(docs: Path) -> Frame:
    """What stands round every page: links to all of them, and when this one was made."""
    navigation = [("index.html", "Study"), *((f"{name}.html", name[:2]) for name in NOTEBOOKS)]
    navigation += [("explorer.html", "Explorer")] if (docs / "explorer.html").is_file() else []
    navigation += [*((f"{name}.html", title) for name, title in _guides(docs).items()), ("reference.html", "Reference")]
    return Frame(navigation, f"commit {commit()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}")


def _written(pages: Mapping[str, tuple[str, str]], frame: Frame, docs: Path) -> list[Path]:
    for name, (title, body) in pages.items():
        with atomic_write(docs / name) as temporary:
            Path(temporary).write_text(frame.page(name, title, body), encoding="utf-8")
    return [docs / name for name in pages]


def _with_pictures(text: str, docs: Path) -> str:
    """A document whose pictures of figures/ lie beside the page, where GitHub Pages finds them."""
    (docs / "pictures").mkdir(parents=True, exist_ok=True)
    for name in set(re.findall(r"\]\(\.\./figures/([\w-]+\.png)\)", text)):
        shutil.copyfile(docs.parent / "figures" / name, docs / "pictures" / name)
    return text.replace("](../figures/", "](pictures/")


def _executed(run: Path, name: str) -> Path:
    """The copy that the notebook's stamp names: copies of failed runs lie in the same folder."""
    remedy = "run `make study` first, or ask for the documents alone (--documents)."
    stamps = [stamp for stamp in stamps_of(run) if (stamp["folder"], stamp["notebook"]) == (".", name)]
    named = [Path(stamp["executed"]).name for stamp in sorted(stamps, key=lambda stamp: stamp["ended_utc"])]
    if not named or not (found := run / "executed" / named[-1]).is_file():
        raise FileNotFoundError(f"data/results/{run.name} has no finished, executed {name}: {remedy}")
    outputs = [output for cell in load_notebook(found)["cells"] for output in cell.get("outputs", ())]
    if any(output["output_type"] == "error" for output in outputs):
        raise FileNotFoundError(f"data/results/{run.name}: the executed {name} holds an error: {remedy}")
    return found


def _title(executed: Path) -> str:
    first = source_of(load_notebook(executed)["cells"][0]).splitlines()[0]
    return first.lstrip("# ").strip()


def index(rows: list[dict[str, Any]], titles: Mapping[str, str], pages: Mapping[str, str], gpu: str, costs: str) -> str:
    """The story in one screen: what, how much faster, what it costs, on which model, how to use it."""
    explorer = " · [move the sliders](explorer.html)" if "explorer.html" in pages else ""
    lines = [
        "# Reading a prompt with fewer and fewer tokens",
        "",
        "While a causal language model reads its prompt (*prefill*), later layers need fewer and fewer of the tokens. "
        "SDTP ([Tao et al.](https://arxiv.org/abs/2504.04514)) scores the tokens before some layers and drops the "
        "least important ones: what follows computes on a shorter sequence and keeps a shorter KV cache. This library "
        "does it for causal models of `transformers` in one `with`; five notebooks measure what that saves and costs.",
        "",
        f"- **How much faster:** {faster(latency_table(rows))}",
        *([f"- **On a GPU:** {gpu}"] if gpu else []),
        f"- **What it costs:** {costs or cost(scorer_table(rows))}",
        f"- **On which model:** {origin_line(rows[0]) if rows else 'not measured yet'}. "
        "Larger ones: `make study PARAMS=gpu-qwen2-7b`.",
        f"- **Try it:** `make study` runs everything on a small real model, `make app` opens the explorer{explorer}.",
        "",
        USE,
        "",
        *(f"- [{title}]({name}.html)" for name, title in titles.items()),
        "",
        "![A prompt, each token on the colour of the layer before which it was dropped](pictures/dropped-tokens.png)",
        "",
        "![Prefill speed-up over prompt length, measured and the limit](pictures/speedup.png)",
    ]
    return markdown_html("\n".join(lines))


def broken_links(docs: Path) -> list[str]:
    """Links and pictures of the pages that lead to nothing in ``docs``, as ``page: target``."""
    broken = []
    for page in sorted(docs.glob("*.html")):
        text = page.read_text(encoding="utf-8")
        ids = set(re.findall(r"""\sid=["']([^"']+)""", text))
        for target in re.findall(r"""(?:href|src)=["']([^"']+)["']""", text):
            target = html.unescape(target)
            file, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            if not (file and (docs / file).exists()) and not (not file and anchor in ids):
                broken.append(f"{page.name}: {target}")
    return broken


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=run_name, help="a folder of data/results (default: embedded)")
    parser.add_argument("--documents", action="store_true", help="render docs/*.md and the reference only; the study's "
                        "pages stay as they are")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.documents and options.run is not None:
        parser.error(f"--documents renders no study: leave {options.run!r} out.")
    options.run = options.run or "embedded"
    root = project_root()
    run, docs = root / "data" / "results" / options.run, root / "docs"
    try:
        written = documents(docs) if options.documents else build(run, docs)
    except FileNotFoundError as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in docs.rglob("*") if path.is_file())
    print(f"docs/: {len(written)} pages, {size / 1e6:.1f} MB; open docs/index.html")
    if broken := broken_links(docs):
        print("\n".join(["links that lead to nothing:", *broken]), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
