"""Finds recipes and targets by name or by path.

Names are file names, so listing them reads folders and imports nothing. A recipe is loaded by its path, not by an
import name, so that another package's ``recipes`` cannot shadow ours; a user's own file is loaded in the same way.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.core.errors import UsageError, closest
from packager.core.folders import folder

if TYPE_CHECKING:
    from packager.recipe import Recipe
    from packager.target import Target


def recipes_folder() -> Path:
    return folder("recipes")


def runtimes_folder() -> Path:
    return folder("runtimes")


def targets_folder() -> Path:
    return folder("targets")


def _names(place: Path, suffix: str) -> tuple[str, ...]:
    """File names without suffix, sorted, without those that begin with "_" or "."."""
    return tuple(sorted(file.stem for file in place.glob(f"*{suffix}") if not file.name.startswith(("_", "."))))


def recipe_names() -> tuple[str, ...]:
    return _names(recipes_folder(), ".py")


def target_names() -> tuple[str, ...]:
    return _names(targets_folder(), ".toml")


def _find(kind: str, wanted: str, names: tuple[str, ...], place: Path, suffix: str) -> Path:
    """The file for a name, or a user's own file when ``wanted`` ends in the suffix or contains a path separator.

    Raises UsageError for an unknown name, a missing file or another suffix.
    """
    if wanted.endswith(suffix) or "/" in wanted or "\\" in wanted:
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise UsageError(f"The {kind} file {wanted} does not exist.", fix=f"Known {kind}s: {', '.join(names)}.")
        if path.suffix != suffix:
            raise UsageError(f"The {kind} file {wanted} does not end in {suffix}.", fix=f"A {kind} is a {suffix} file.")
        return path
    if wanted not in names:
        raise UsageError(
            f'There is no {kind} "{wanted}".{closest(wanted, names)}',
            fix=f"Known {kind}s: {', '.join(names)}; or the path of your own {suffix} file.",
        )
    return place / f"{wanted}{suffix}"


def load_target(name_or_path: str) -> Target:
    """The target of that name, or the one in a user's TOML file. Raises UsageError."""
    from packager.target import load_target as read

    return read(_find("target", name_or_path, target_names(), targets_folder(), ".toml"))


def load_recipe(name_or_path: str) -> Recipe[Any]:
    """The recipe of that name, or the one in a user's Python file. Raises UsageError when the file holds none."""
    return _recipe_from(_find("recipe", name_or_path, recipe_names(), recipes_folder(), ".py"))


def _recipe_from(path: Path) -> Recipe[Any]:
    from packager.recipe import Recipe

    file = path.resolve()
    # One import name for each path: two files of the same name are two modules.
    module_name = f"packager_recipe_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    module = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, file)
        if spec is None or spec.loader is None:
            raise UsageError(f"The recipe file {path} cannot be loaded as Python.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look their module up while the file is executed
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UsageError(
                f"The recipe file {path} failed while it was read.",
                why=f"{type(error).__name__}: {error}",
                fix="Import heavy or optional libraries inside build, not at the top of the file.",
            ) from error
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise UsageError(
            f"The recipe file {path} defines no RECIPE.", fix='It needs "RECIPE = Recipe(...)", see packager.recipe.'
        )
    if recipe.name != path.stem:
        raise UsageError(
            f'The recipe in {path} has the name "{recipe.name}".',
            fix=f'The file name is the identifier: name="{path.stem}".',
        )
    return recipe
