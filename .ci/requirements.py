"""Print the requirements of pyproject.toml, one a line: as they are, or at their oldest."""

import argparse
import re
import tomllib
from pathlib import Path

EXTRAS = ("plots", "demo", "report", "test")
# They run or build the tests; which of them is old says nothing about the library.
TOOLS = ("build", "hypothesis", "pytest", "pytest-benchmark")


def main() -> None:
    """Read the command line, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--but", nargs="*", default=[], help="names to leave out")
    parser.add_argument("--oldest", action="store_true", help="== for >=, but of tools")
    arguments = parser.parse_args()
    path = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    found = list(project["dependencies"])
    for extra in EXTRAS:
        found += project["optional-dependencies"][extra]
    for requirement in sorted(set(found)):
        name = re.match(r"[\w-]+", requirement)[0]
        if name not in arguments.but:
            oldest = arguments.oldest and name not in TOOLS
            print(requirement.replace(">=", "==") if oldest else requirement)


if __name__ == "__main__":
    main()
