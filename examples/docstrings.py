"""Docstrings of Python's standard library as short documents: docstrings.jsonl."""
import ast
import json
import pathlib
import sysconfig

documents = {}
for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).rglob("*.py")):
    if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.parts):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and len(text := ast.get_docstring(node) or "") > 200:
                documents[text] = None
pathlib.Path("docstrings.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
