"""Real texts that every Python brings along: what its standard library says about itself.

    python docstrings.py FOLDER

writes families.jsonl (a sentence, and the package that it comes from) and answers.json (questions in the format of
SQuAD 2.0, of which every third has no answer). The same Python version gives the same files.
"""

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FAMILIES = ("asyncio", "email", "http", "importlib", "multiprocessing", "tkinter", "unittest", "xml")
RETURNS = re.compile(r"\bReturns? (?:an? |the |True if )?(\w[^.:;\n]{8,60}?)(?=[.:;,]|\n\n|$)")


def docstrings(package: str) -> Iterator[tuple[str, str]]:
    """(name of a class or function, its docstring in one line), in the order of files and lines."""
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        if "test" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                yield node.name, " ".join(str(ast.get_docstring(node)).split())


def sentences() -> Iterator[dict[str, str]]:
    """The first sentence of each docstring that has one of four words or more, once each."""
    seen = set()
    for family in FAMILIES:
        for _, text in docstrings(family):
            sentence = text.split(". ")[0]
            if len(sentence.split()) >= 4 and sentence not in seen:
                seen.add(sentence)
                yield {"text": sentence, "family": family}


def questions() -> dict[str, object]:
    """What does a function return? In every third case the passage is that of another function."""
    found = []
    for family in FAMILIES:
        for name, text in docstrings(family):
            answer = RETURNS.search(text)
            if answer and not name.startswith("_"):
                found.append((f"What does {name} return?", text, answer))
    paragraphs = []
    for number, (question, text, answer) in enumerate(found):
        elsewhere = number % 3 == 2
        context = found[number - 1][1] if elsewhere else text
        answers = [] if elsewhere else [{"text": answer[1], "answer_start": answer.start(1)}]
        entry = {"id": str(number), "question": question, "answers": answers, "is_impossible": elsewhere}
        paragraphs.append({"context": context, "qas": [entry]})
    return {"version": "v2.0", "data": [{"title": "the standard library", "paragraphs": paragraphs}]}


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in sentences()]
    (folder / "families.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "answers.json").write_text(json.dumps(questions(), indent=1), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
