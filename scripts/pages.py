"""Writes the pages that come from the code: docs/python.md, and docs/cli.md.

    pages.py [FOREBAY]

docs/python.md comes from signatures and docstrings, which are read and not run. docs/cli.md comes
from the `--help` of the program FOREBAY, and is left alone if none is named. `make generate` calls
this. A test compares both pages with the code.
"""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bindings" / "python" / "forebay"
COMMANDS = ("check", "index", "rewrite", "plan", "serve", "top", "bench", "verify", "config")
#: The sections of docs/python.md: a heading, a module, and its public names by their files.
MODULES = (
    ("NumPy arrays", "forebay", {
        "_loader.py": ["Loader", "Batches"], "_split.py": ["Consumer"], "_shown.py": ["Stats", "Plan"],
    }),
    ("torch tensors", "forebay.torch", {"torch/loader.py": ["DataLoader"], "torch/dataset.py": ["TokenDataset"]}),
    ("Trainers", "forebay.adapters", {"adapters.py": ["hugging_face", "torchtitan", "megatron", "olmo"]}),
    ("Types of batches", "forebay.batches", {"batches.py": [
        "Batch", "ShiftedBatch", "HfBatch", "HfPackedBatch", "TitanInputs", "MegatronBatch", "OlmoBatch", "JaxBatch",
    ]}),
    ("Exceptions", "forebay", {"_errors.py": [
        "ForebayError", "ConfigError", "DataError", "StateMismatchError", "NotFoundError", "ReadError", "ClosedError",
        "InternalError",
    ]}),
)  # fmt: skip
SPECIAL = {"__iter__": "iter(x)", "__len__": "len(x)", "__next__": "next(x)", "__getitem__": "x[index]"}
#: Names of objects in the headings of their methods.
SHORT = {
    "Loader": "loader", "DataLoader": "loader", "Batches": "batches", "Consumer": "consumer", "TokenDataset": "dataset",
}  # fmt: skip
NOTE = "<!-- `make generate` writes this page. Change the docstrings instead. -->\n"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def settings() -> set[str]:
    """Names of all settings, from the table in docs/settings.md."""
    return set(re.findall(r"^\| `(\w+)` \| `FOREBAY_", (ROOT / "docs" / "settings.md").read_text(), re.MULTILINE))


def parsed(file: str) -> dict[str, ast.stmt]:
    body = ast.parse((PACKAGE / file).read_text()).body
    return {node.name: node for node in body if isinstance(node, ast.ClassDef | Function)}


def wrapped(text: str) -> str:
    """Breaks paragraphs and items of a list into lines of at most 100 characters."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        items = re.split(r"\n(?=- )", paragraph)
        out.append("\n".join(
            textwrap.fill(" ".join(item.split()), 100, subsequent_indent="  " if item.startswith("- ") else "",
                          break_long_words=False, break_on_hyphens=False)
            for item in items
        ))  # fmt: skip
    return "\n\n".join(out)


def markdown(doc: str) -> str:
    """Turns a docstring with sections of NumPy's style into Markdown. Leaves parameters out."""
    doc = re.sub(r"``([^`]+)``", r"`\1`", doc)
    # Code stays in one line: a blank in it is a character of its own until the lines are broken.
    doc = re.sub(r"`[^`]+`", lambda code: re.sub(r"\s+", "\0", code.group()), doc)
    parts = re.split(r"^([A-Z][\w ]+)\n-{3,}\n", doc, flags=re.MULTILINE)
    text = wrapped(parts[0])
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title in ("Parameters", "Other Parameters"):
            continue
        text += f"\n\n{title}:\n"
        for name, meaning in re.findall(r"^(\S[^\n]*)\n((?:    .*\n?|\n)+)", body + "\n", re.MULTILINE):
            names = ", ".join(f"`{part}`" for part in name.rstrip(":").split(", "))
            item = f"- {names}: " + " ".join(meaning.split())
            text += "\n" + textwrap.fill(item, 100, subsequent_indent="  ", break_on_hyphens=False)
    return text.replace("\0", " ")


def signature(function: Function, known: set[str], name: str) -> str:
    """The signature in one line. Settings are one argument."""
    if name in SPECIAL.values():
        return name
    args = function.args
    shown, left_out = [], False
    positional = args.posonlyargs + args.args
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for arg, default in zip(positional, defaults, strict=True):
        if arg.arg not in ("self", "cls"):
            shown.append(arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}")
    keywords = []
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if arg.arg in known:
            left_out = True
        elif not arg.arg.startswith("_"):
            keywords.append(arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}")
    if keywords:
        shown += ["*", *keywords]
    if args.kwarg is not None:
        shown.append(f"**{args.kwarg.arg}")
    elif left_out:
        shown.append("**settings")
    return f"{name}({', '.join(shown)})"


def is_overload(function: Function) -> bool:
    return any("overload" in ast.unparse(decorator) for decorator in function.decorator_list)


def function_text(function: Function, known: set[str], prefix: str = "") -> str:
    name = SPECIAL.get(function.name, function.name)
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if "property" in decorators:
        head = f"{prefix}.{name}" if prefix else name
    else:
        head = signature(function, known, name if name in SPECIAL.values() or not prefix else f"{prefix}.{name}")
        head = head.replace("x", prefix, 1) if name in SPECIAL.values() else head
    return f"#### `{head}`\n\n{markdown(ast.get_docstring(function) or '')}\n"


def fields_text(node: ast.ClassDef, classes: dict[str, ast.stmt]) -> str:
    """The keys of a typed dictionary, with those that it inherits."""
    rows = []
    for base in node.bases:
        if isinstance(base, ast.Name) and isinstance(inherited := classes.get(base.id), ast.ClassDef):
            rows += fields_text(inherited, classes).splitlines()
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            kind = ast.unparse(item.annotation)
            optional = kind.startswith("NotRequired[")
            kind = kind.removeprefix("NotRequired[").removesuffix("]") if optional else kind
            rows.append(f"| `{item.target.id}` | `{kind}` | {'on request' if optional else 'always'} |")
    return "\n".join(rows)


def class_text(node: ast.ClassDef, classes: dict[str, ast.stmt], known: set[str]) -> str:
    methods = [item for item in node.body if isinstance(item, Function) and not is_overload(item)]
    init = next((item for item in methods if item.name == "__init__"), None)
    is_error = any("Error" in ast.unparse(base) or ast.unparse(base) == "Exception" for base in node.bases)
    if is_error:
        bases = ", ".join(f"`{ast.unparse(base)}`" for base in node.bases)
        return f"| `{node.name}` | {bases} | {' '.join(markdown(ast.get_docstring(node) or '').split())} |"
    rows = fields_text(node, classes)
    if rows and init is None and not methods:
        doc = markdown(ast.get_docstring(node) or "")
        return f"### {node.name}\n\n{doc}\n\n| key | type | there |\n|---|---|---|\n{rows}\n"
    head = (
        signature(init, known, node.name)
        if init is not None and node.name not in ("Batches", "Consumer", "Plan")
        else ""
    )
    text = f"### {node.name}\n\n"
    if head:
        text += "```text\n" + "\n".join(textwrap.wrap(head, 98, subsequent_indent="    ")) + "\n```\n\n"
    text += markdown(ast.get_docstring(node) or "") + "\n"
    if head and "**settings" in head:
        text += "\n`settings` are [all settings](settings.md) by their names.\n"
    for method in methods:
        decorators = ", ".join(map(ast.unparse, method.decorator_list))
        is_public = method.name in SPECIAL or not method.name.startswith("_")
        if is_public and ast.get_docstring(method) and "setter" not in decorators:
            owner = node.name if "classmethod" in decorators else SHORT.get(node.name, "x")
            text += "\n" + function_text(method, known, owner)
    return text


def python_page() -> str:
    known = settings()
    text = NOTE + "# Python API\n\nEvery public class and function, from its docstring.\n"
    for title, module, files in MODULES:
        text += f"\n## {title}: `{module}`\n\n"
        parts = []
        for file, names in files.items():
            classes = parsed(file)
            for name in names:
                node = classes[name]
                if isinstance(node, ast.ClassDef):
                    parts.append(class_text(node, classes, known))
                else:
                    assert isinstance(node, Function)
                    parts.append(function_text(node, known).replace("#### ", "### ", 1))
        if title == "Exceptions":
            text += "Every exception has `path`, `block` and `row`: the place of the fault, or None.\n\n"
            text += "| exception | is a | meaning |\n|---|---|---|\n" + "\n".join(parts) + "\n"
        else:
            text += "\n".join(parts)
    return text.rstrip() + "\n"


def cli_page(program: str) -> str:
    def help_of(*command: str) -> str:
        done = subprocess.run([program, *command, "--help"], capture_output=True, text=True, check=True)
        return "```text\n" + done.stdout.rstrip() + "\n```\n"

    text = NOTE.replace("docstrings", "commands' help") + "# Options of the command line\n\n"
    text += "The text of `--help`. [Command line](commands.md) shows the use of each command.\n\n"
    text += "## forebay\n\n" + help_of()
    for command in COMMANDS:
        text += f"\n## forebay {command}\n\n" + help_of(command)
    return text


def main() -> None:
    (ROOT / "docs" / "python.md").write_text(python_page())
    if sys.argv[1:]:
        (ROOT / "docs" / "cli.md").write_text(cli_page(sys.argv[1]))


if __name__ == "__main__":
    main()
