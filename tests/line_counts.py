"""The limits that keep this codebase readable in one sitting: `make lint` prints and checks them."""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNTIME = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "runtime").glob("*.py"))
LIMITS = {                                              # files counted together: most lines
    ("sft.py",): 165,
    ("train_gvm.py",): 410,
    ("dvpo.py",): 300,
    ("ppo_baseline.py",): 430,
    ("common.py",): 860,
    ("common.py", *RUNTIME): 2250,
    ("test_smoke.py",): 300,
    **{(f"comparators/{name}.py",): 220 for name in ("dpo", "remax", "grpo")},
    ("README.md",): 160,
    **{(path,): 260 for path in RUNTIME},
}


def main():
    failed = False
    for names, most in LIMITS.items():
        lines = sum(len((ROOT / name).read_text().splitlines()) for name in names)
        label = names[0] if len(names) == 1 else "common.py + runtime/"
        failed |= lines > most
        print(f"{label:<26}{lines:>6} of {most:>5} lines{'   TOO LONG' if lines > most else ''}")
    wide = [line for line in (ROOT / "README.md").read_text().splitlines() if len(line) > 120]
    size = (ROOT / "README.md").stat().st_size
    print(f"README.md: {size / 1000:.1f} of 11.0 kB, {len(wide)} lines over 120 characters")
    sys.exit(failed or bool(wide) or size > 11_000)


if __name__ == "__main__":
    main()
