"""How dense the code is, and how much of it there is: `make lint` prints and checks it.

Nobody reads a line of 110 columns with five operators for pleasure. A limit is met by clearer code, never by
joining or splitting lines.
"""
import ast
import io
import pathlib
import sys
import tokenize

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAGES = "sft.py", "train_gvm.py", "dvpo.py", "ppo_baseline.py"
WIDE = 95                                               # columns
# Most code lines that are wide, in percent; most tuple assignments (a, b = x, y) in 100 code lines; least
# comment lines in 100; most names of common
LIMITS = {
    "sft.py": (10, 1, 25, 25), "train_gvm.py": (10, 1, 25, 25), "dvpo.py": (10, 1, 25, 25),
    "ppo_baseline.py": (10, 1, 25, 25), "common.py": (10, 1, 14, None),
}
ALL = 5600                                              # lines without tests
README = 160, 11_000                                    # lines, bytes


def measure(path):
    text = path.read_text()
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        is_block = isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))
        if is_block and ast.get_docstring(node, clean=False) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comments += token.type == tokenize.COMMENT
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
            code |= set(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    lines = text.split("\n")
    assigned = [node for node in ast.walk(tree)
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)]
    tuples = sum(any(isinstance(target, ast.Tuple) for target in node.targets) for node in assigned)
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
             and isinstance(node.value, ast.Name) and node.value.id == "common"}
    n = len(code) / 100
    wide = sum(len(lines[i - 1]) > WIDE for i in code)
    return dict(lines=len(lines) - 1, wide=wide / n, tuples=tuples / n, comments=comments / n,
                names=len(names))


def main():
    failed = False
    print(f"{'':20}{'lines':>7}{'wide %':>8}{'tuples':>8}{'comments':>10}{'common.*':>10}")
    for name, (wide, tuples, comments, names) in LIMITS.items():
        found = measure(ROOT / name)
        wrong = found["wide"] > wide or found["tuples"] > tuples or found["comments"] < comments
        wrong |= names is not None and found["names"] > names
        failed |= wrong
        numbers = f"{found['lines']:7}{found['wide']:8.0f}{found['tuples']:8.1f}"
        numbers += f"{found['comments']:10.0f}{found['names']:10}"
        print(f"{name:20}{numbers}{'   TOO DENSE' if wrong else ''}")
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "tests", "out"} & {*path.parts}]
    lines = sum(len(path.read_text().splitlines()) for path in files if path.name != "test_smoke.py")
    print(f"{lines} of {ALL} lines without tests")
    page = (ROOT / "README.md").read_text()
    wide = [line for line in page.splitlines() if len(line) > 120]
    size = len(page.splitlines()), len(page.encode())
    print(f"README.md: {size[0]} of {README[0]} lines, {size[1]} of {README[1]} bytes, {len(wide)} too wide")
    too_long = size[0] > README[0] or size[1] > README[1]
    sys.exit(failed or lines > ALL or too_long or bool(wide))


if __name__ == "__main__":
    main()
