"""Lines of code of a package: ``python tests/benchmarks/lines.py [FOLDER ...]``.

Docstrings, comments and blank lines are not counted.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstring_lines(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def code_lines(path):
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = {
        line
        for token in tokens
        if token.type not in NOT_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(found - set(docstring_lines(text)))


def main():
    for folder in sys.argv[1:] or ["ema_optim"]:
        rooms = {}
        for path in sorted(Path(folder).rglob("*.py")):
            room = path.relative_to(folder).parts[0]
            rooms[room] = rooms.get(room, 0) + code_lines(path)
        for room, lines in rooms.items():
            print(f"{lines:6} {room}")
        print(f"{sum(rooms.values()):6} {folder}")


if __name__ == "__main__":
    main()
