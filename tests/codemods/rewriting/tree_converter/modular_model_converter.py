"""A modular converter small enough to read, with the command line and the inheritance of transformers' own.

It knows configuration classes only. A class takes the attributes of its parent, which is read from the parent's
configuration file, one level per conversion; its own replace them whole; `= AttributeError()` deletes. Files are
converted in the order given.
"""

import ast
import sys
from pathlib import Path

HEADER = "# This file was automatically generated from {}.\n# Do NOT edit it by hand.\n"


def main(names):
    for name in names:
        sys.stdout.write(f"Converting {name}\n")
        path = Path(name)
        generated = path.with_name(path.name.replace("modular_", "configuration_"))
        generated.write_text(HEADER.format(name) + converted(path), encoding="utf-8")


def converted(path):
    text = path.read_text("utf-8")
    statements = ast.parse(text).body
    parents = dict(imported_classes(path, statements))
    kept = [segment(text, node) for node in statements if not imports_models(node) and not is_class(node)]
    bodies = [flattened(text, node, parents) for node in statements if is_class(node)]
    inherited = [line for file, _ in parents.values() for line in library_imports(file)]
    return "\n".join([*dict.fromkeys([*inherited, *kept]), *(f"\n\n{body}" for body in bodies)]) + "\n"


def is_class(node):
    return isinstance(node, ast.ClassDef)


def imports_models(node):
    return isinstance(node, ast.ImportFrom) and node.level == 2


def imported_classes(path, statements):
    for node in filter(imports_models, statements):
        file = path.parents[1].joinpath(*node.module.split(".")).with_suffix(".py")
        for alias in node.names:
            yield alias.name, (file, next(n for n in ast.parse(file.read_text("utf-8")).body if names(n) == alias.name))


def library_imports(file):
    text = file.read_text("utf-8")
    return [segment(text, node) for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]


def names(node):
    """Return what a statement defines; statements that define nothing are known by their text."""
    if isinstance(node, ast.Assign):
        return node.targets[0].id
    if isinstance(node, ast.AnnAssign):
        return node.target.id
    return getattr(node, "name", ast.unparse(node))


def flattened(text, child, parents):
    base = child.bases[0].id
    file, parent = parents.get(base, (None, None))
    attributes = {}
    if parent is not None:
        parent_text = file.read_text("utf-8")
        attributes = {names(node): segment(parent_text, node) for node in parent.body}
        base = parent.bases[0].id
    attributes |= {names(node): segment(text, node) for node in child.body if not isinstance(node, ast.Pass)}
    deleted = {names(node) for node in child.body if ast.unparse(node).endswith("= AttributeError()")}
    body = [f"    {value}" for name, value in attributes.items() if name not in deleted] or ["    pass"]
    return "\n".join([f"class {child.name}({base}):", *body])


def segment(text, node):
    return ast.get_source_segment(text, node)


if __name__ == "__main__":
    main(sys.argv[1:])
