"""Every message with which this project refuses, fails or warns, read from its sources.

`python docs/tools/messages.py` compares them with docs/troubleshooting.md: it prints each message
that the page lacks, as a row to fill in, and each row whose message is gone; then its status is 1.

A message is what the sources say, with `…` in place of what is put in at run time.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
PLACE = "…"
_PYTHON = ("sglang_tokenweave/**/*.py", "launch/**/*.py", "patches/apply.py")
_NO_MESSAGES = ("timeline/page.py", "timeline/words.py")  # a page, and what is said of a profile
_SHELL = ("launch/**/*.sh",)
_DEVICE = ("cuda/*.cu", "cuda/*.cuh")
# Calls that tell people something, by the name of the function or method.
_CALLS = {"error", "warning", "exception", "critical", "_warn", "_decline"}
_PRINTS = {"print", "say"}  # where an exception is handled
# Functions that return other texts than reasons and problems.
_NOT_MESSAGES = {"_summary", "summary", "_describe", "who_decides", "_column"}
_NOT_MESSAGES |= {"_where", "_why", "_verdict"}  # what `explain` says
_LEAST_WORDS = 3  # of a returned or collected text that is no name and no format


def main() -> int:
    """Print the differences between sources and page; return the exit code."""
    missing, stale = compare()
    for message, place in missing.items():
        print(f"missing, from {place}:\n| {cell(message)} | CAUSE | REMEDY |")
    for message in stale:
        print(f"no longer in the sources: {message}")
    return 1 if missing or stale else 0


def compare() -> tuple[dict[str, str], list[str]]:
    """Return the messages that the page lacks, with their files, and its rows without a message."""
    said, written = messages(), rows()
    missing = {message: place for message, place in said.items() if message not in written}
    return missing, [message for message in written if message not in said]


def messages() -> dict[str, str]:
    """Return every message and the file that it is in."""
    readers = ((_PYTHON, _of_python), (_SHELL, _of_shell), (_DEVICE, _of_device))
    return {
        message: path.relative_to(ROOT).as_posix()
        for patterns, read in readers
        for pattern in patterns
        for path in sorted(ROOT.glob(pattern))
        if not path.as_posix().endswith(_NO_MESSAGES)
        for message in read(path.read_text())
    }


def rows() -> dict[str, tuple[str, str]]:
    """Return the page's rows: message to cause and remedy."""
    pattern = re.compile(r"^\| (`+) ?(.+?) ?\1 \| (.*?) \| (.*?) \|$", re.MULTILINE)
    found = pattern.findall(PAGE.read_text().replace(r"\|", "\0"))
    return {text.replace("\0", "|"): (cause, remedy) for _, text, cause, remedy in found}


def cell(message: str) -> str:
    """Return a message as code in a table's cell."""
    escaped = message.replace("|", r"\|")
    return f"`` {escaped} ``" if "`" in message else f"`{escaped}`"


def normalise(text: str) -> str:
    """Return a text on one line, runs of placeholders as one, without a blank end."""
    one_line = re.sub(r"\s+", " ", text).strip(" ;:,")
    return re.sub(rf"{PLACE}[{PLACE} ,]*{PLACE}", PLACE, one_line)


def _of_python(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    yield from _of_tables(tree)
    for function in [*_functions(tree), tree]:
        if getattr(function, "name", "") in _NOT_MESSAGES:
            continue
        names = _assigned(function)
        gives_reasons = re.search("probe|problem|reason", getattr(function, "name", ""))
        for node in _own_nodes(function):
            for expression, least_words in _expressions(node):
                for text in _texts(expression, names):
                    if _num_words(text) >= (1 if gives_reasons else least_words):
                        yield normalise(text)


def _of_tables(tree: ast.Module) -> Iterator[str]:
    """Yield what tables hold: names of CUDA's errors, and features that are refused."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node) == "Rule":
            yield f"not supported with {ast.literal_eval(node.args[2])}"
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_REMEDIES":
            words = [word.value for word in ast.walk(node.value) if isinstance(word, ast.Constant)]
            errors = [
                re.fullmatch(r"(?:CUDA_ERROR_)?([A-Z]+_[A-Z_]+)", str(word)) for word in words
            ]
            yield from (f"CUDA_ERROR_{error[1]}" for error in errors if error)


def _num_words(text: str) -> int:
    return len(re.findall(r"(?<![-\w])[A-Za-z]{2,}", text.replace(PLACE, " ")))


def _functions(tree: ast.AST) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function or module, without those of functions inside it."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from _own_nodes(child)


def _assigned(function: ast.AST) -> dict[str, ast.expr]:
    """Return what each name of a function was last given."""
    return {
        target.id: node.value
        for node in _own_nodes(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _expressions(node: ast.AST) -> Iterator[tuple[ast.expr, int]]:
    """Yield the expressions of a node that may be a message, and how many words make it one."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield from ((text, 0) for text in node.exc.args[:1])
    elif isinstance(node, ast.Assert) and node.msg:
        yield node.msg, 1
    elif isinstance(node, ast.Return | ast.AugAssign) and node.value:
        yield node.value, _LEAST_WORDS
    elif isinstance(node, ast.ExceptHandler):
        calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
        yield from ((text, 1) for call in calls if _name(call) in _PRINTS for text in call.args[:1])
    elif isinstance(node, ast.Call):
        if _name(node) in _CALLS:
            yield from ((text, 1) for text in node.args[:1])
        elif _name(node) == "append":
            yield from ((text, _LEAST_WORDS) for text in node.args)
        reasons = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
        yield from ((text, _LEAST_WORDS) for text in reasons)


def _name(call: ast.Call) -> str:
    """Return the name of a called function or method."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _texts(node: ast.expr, names: dict[str, ast.expr]) -> Iterator[str]:
    """Yield the texts that an expression can be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield re.sub(r"%[sdrifg]", PLACE, node.value)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else PLACE for part in node.values
        )
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = list(_texts(node.left, names)), list(_texts(node.right, names))
        yield (left[0] if left else PLACE) + (right[0] if right else PLACE)
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body, names)
        yield from _texts(node.orelse, names)
    elif isinstance(node, ast.Tuple | ast.List):
        for element in node.elts:
            yield from _texts(element, names)
    elif isinstance(node, ast.ListComp | ast.GeneratorExp):
        yield from _texts(node.elt, names)
    elif isinstance(node, ast.Name) and node.id in names:
        yield from _texts(names[node.id], {})


def _of_shell(source: str) -> Iterator[str]:
    joined = source.replace("\\\n", " ")
    for words in re.findall(r'\bfail ((?:"[^"]*"\s*)+)', joined):
        text = " ".join(re.findall(r'"([^"]*)"', words))
        yield normalise(re.sub(r"\$\{[^}]*\}|\$\([^)]*\)|\$[\w*]+", PLACE, text))


def _of_device(source: str) -> Iterator[str]:
    for literal in re.findall(r'printf\(\s*((?:"[^"]*"\s*)+)', source):
        text = "".join(re.findall(r'"([^"]*)"', literal)).replace(r"\n", "")
        yield normalise(re.sub(r"%\w+", PLACE, text))


if __name__ == "__main__":
    sys.exit(main())
