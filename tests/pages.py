"""Where the numbers of README.md, docs/ and results/README.md come from: the other pages of results/.

    python tests/pages.py                   make results-check
    python tests/pages.py --write           copy the tables anew

Those pages are written by the programs that measured. A table behind `<!-- methods.md: Runs -->` is the table
under the heading Runs of results/methods.md. A number with two or more decimals in prose must stand in one of
the pages of results/ that its section names.
"""
import argparse
import glob
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NUMBER = re.compile(r"(?<![\w.])\d+\.\d\d+(?![\w.]*\d)")
MARKER = re.compile(r"<!-- (\w+\.md): (.+) -->")
SETTINGS = [                                            # numbers that nobody measured
    r"\d{4}\.\d{5}", r"Python 3\.\d+", r"`[^`]*`",      # arXiv, versions, code
    r"(kl_coef|lambda|lambda is|from|above|below|under|betas|at least|about|eps|target|to) -?\(?0\.\d+",
    r"paper[^.]* reports 0\.57 and 0\.66[^.]*0\.69 and 0\.77",
]


def read(path):
    with open(os.path.join(ROOT, path)) as f:
        return f.read()


def source_table(name, heading):
    """The first table under a heading of results/NAME."""
    text = read(f"results/{name}")
    for section in re.split(r"^#+ ", text, flags=re.M):
        if section.startswith(heading + "\n"):
            lines = section.splitlines()
            start = next(i for i, line in enumerate(lines) if line.startswith("|"))
            stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
            return lines[start:stop]
    sys.exit(f"error: results/{name} has no heading {heading!r}")


def with_tables(text):
    """The text with every marked table copied anew."""
    lines = []
    inside = False
    for line in text.splitlines():
        inside = inside and line.startswith("|")
        if not inside:
            lines.append(line)
        if match := MARKER.fullmatch(line):
            lines += source_table(*match.groups())
            inside = True
    return "\n".join(lines) + "\n"


def strangers(section):
    """The numbers of a section's prose that no page of results/ has which the section names."""
    names = {name for name in re.findall(r"(\w+\.md)\b", section)
             if name != "README.md" and os.path.exists(f"{ROOT}/results/{name}")}
    known = set(NUMBER.findall("\n".join(read(f"results/{name}") for name in names)))
    prose = "\n".join(line for line in section.splitlines() if not line.startswith("    "))
    for pattern in SETTINGS:
        prose = re.sub(pattern, " ", prose)
    return sorted(set(NUMBER.findall(prose)) - known)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true", help="copy the tables into the pages")
    args = p.parse_args(argv)
    wrong = []
    for page in ["README.md", "results/README.md", *sorted(glob.glob("docs/*.md", root_dir=ROOT))]:
        text = read(page)
        new = with_tables(text)
        if args.write:
            with open(os.path.join(ROOT, page), "w") as f:
                f.write(new)
        elif new != text:
            wrong.append(f"{page}: a table is not that of results/; run this with --write")
        for section in re.split(r"^(?=## )", new, flags=re.M):
            for number in strangers(section):
                wrong.append(f"{page}, {section.splitlines()[0]}: {number} is in no page that it names")
    if wrong:
        sys.exit("error: " + "\n       ".join(wrong))
    print("README.md, docs/ and results/README.md agree with results/")


if __name__ == "__main__":
    main()
