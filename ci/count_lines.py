"""python ci/count_lines.py: the lines of the core, which must stay small enough to be read in one sitting.

Code lines are neither blank, comment nor docstring. Exits 1 at the limit.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

CORE = (
    "api", "loading", "prompts", "stream", "core", "pace", "scheduler", "packing", "pages", "sequence", "step", "backend",
    "sampling",
)
LIMIT = 2000
NO_CODE = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
)


def code_lines(source: str) -> int:
    """Lines of `source` on which a token stands that is no comment and no docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):             # docstrings, and the texts under constants that document them
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return len(lines)


def main() -> int:
    engine = Path(__file__).resolve().parent.parent / "engine"
    totals = [0, 0]
    for name in CORE:
        source = (engine / f"{name}.py").read_text("utf-8")
        code, physical = code_lines(source), len(source.splitlines())
        totals = [totals[0] + code, totals[1] + physical]
        print(f"{code:6,} code lines {physical:6,} lines  engine/{name}.py")
    print(f"{totals[0]:6,} code lines {totals[1]:6,} lines  in all; the limit is {LIMIT:,} code lines")
    return 0 if totals[0] < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
