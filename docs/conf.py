"""Sphinx's settings for `make docs`; .ci/docs.py writes the pages that it reads."""
import html
import io
import json
import re
from pathlib import Path

from docutils import nodes
from sphinx.search.en import SearchEnglish
from sphinx.transforms.post_transforms import SphinxPostTransform

HERE = Path(__file__).parent
project, author, language = "ascend_nb", "The ascend_nb authors", "en"
extensions = ["myst_nb"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors, nb_execution_mode, nb_merge_streams = 3, "off", True
nb_ipywidgets_js = {"widgets.js": {"defer": "defer"}}
nb_render_markdown_format = "myst"
suppress_warnings = ["misc.highlighting_failure", "myst.header", "myst.xref_missing"]  # output is no Python; levels start anew; .ci/docs.py checks every link
templates_path, html_static_path = [], [str(HERE / "_static"), str(HERE.parent / "_proc" / "widgets")]
html_theme, html_title, html_css_files, html_copy_source, html_show_copyright = "furo", "ascend_nb", ["site.css"], False, False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_math_renderer, html_search_language = "drawn", "en_zh"
pygments_style, pygments_dark_style = "friendly", "github-dark"
CJK = r"\u3400-\u9fff\uf900-\ufaff"


class SearchBoth(SearchEnglish):
    "English words as Sphinx stems them; Chinese as every character and every pair of neighbours, which needs no dictionary."
    lang = "en_zh"
    js_splitter_code = r"""
var splitQuery = query => query.match(/[CJK]+|[\p{Letter}\p{Number}_]+/gu)?.flatMap(w =>
  !/^[CJK]/.test(w) ? w.split(/(?=[CJK])|(?<=[CJK])(?![CJK])/u) : w.length == 1 ? [w] : Array.from(w).slice(1).map((c, i) => w[i] + c)) ?? [];
""".replace("CJK", CJK)

    def split(self, text):
        words = []
        for w in re.findall(rf"[{CJK}]+|[^\W{CJK}]+", text): words += [w] if not re.match(rf"[{CJK}]", w) else [*w, *(w[i:i + 2] for i in range(len(w) - 1))]
        return words

    def stem(self, word): return word if re.match(rf"[{CJK}]", word) else super().stem(word)

    def word_filter(self, word): return bool(re.match(rf"[{CJK}]", word)) or super().word_filter(word)


class LinkNames(SphinxPostTransform):
    "`TrainConfig` in the text leads to its entry, if one module alone exports that name."
    default_priority = 400

    def run(self, **kw):
        known, here = self.config.api_names, self.env.docname
        for node in list(self.document.findall(nodes.literal)):
            page = known.get(node.astext().removesuffix("()"))
            if not page or page[0] == here or isinstance(node.parent, (nodes.reference, nodes.title)): continue
            uri = self.app.builder.get_relative_uri(here, page[0]) if self.app.builder.format == "html" else ""
            node.replace_self(nodes.reference("", "", node.deepcopy(), refuri=f"{uri}#{page[1]}", internal=True))


def draw_math(self, node):
    "A formula as a picture in the page: matplotlib draws it, so no script and no font is fetched."
    from matplotlib import mathtext
    from matplotlib.font_manager import FontProperties
    out, tex = io.BytesIO(), " ".join(node.astext().split())
    for spoken, drawn in ((r"\lvert", "|"), (r"\rvert", "|"), (r"\sqrt 2", r"\sqrt{2}")): tex = tex.replace(spoken, drawn)
    depth = mathtext.math_to_image(f"${tex}$", out, dpi=72, prop=FontProperties(size=12), format="svg")  # 12 pt are one em
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<g id=\"patch_1\">.*?</g>", "", out.getvalue().decode(), flags=re.S)
    svg = re.search(r"<svg.*</svg>", text, re.S)[0]
    width, height = (float(re.search(rf' {side}="([\d.]+)pt"', svg)[1]) / 12 for side in ("width", "height"))
    kind = "math" if isinstance(node, nodes.math) else "math block"
    self.body.append(svg.replace("<svg", f'<svg class="{kind}" style="width:{width:.2f}em;height:{height:.2f}em;vertical-align:{-depth / 12:.2f}em" role="img" '
                                         f'aria-label="{html.escape(tex)}"', 1))
    raise nodes.SkipNode


def setup(app):
    app.add_config_value("api_names", json.loads((HERE.parent / "_proc" / "names.json").read_text()), "env")
    app.add_search_language(SearchBoth)
    app.add_post_transform(LinkNames)
    app.add_html_math_renderer("drawn", (draw_math, None), (draw_math, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
