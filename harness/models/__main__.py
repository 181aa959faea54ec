"""`python -m harness.models NAME …`: make the models of recipes, and print their folders."""

import sys

from harness.models.recipe import RECIPES, ensure


def main(names: list[str]) -> int:
    if not names:
        print("usage: python -m harness.models NAME …; recipes: " + ", ".join(sorted(RECIPES)), file=sys.stderr)
        return 2
    for name in names:
        try:
            print(ensure(name))
        except (KeyError, ValueError) as problem:
            print(problem.args[0], file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
