"""A page of the site in fewer bytes: what every page says alike is not written in each.

The site's style (scripts/site/halo.css) dresses what is left as it was, and its script
(scripts/site/page.js) puts back what only a script uses: buttons that copy, and the folds
of the sidebar. A reader whose browser runs no script misses neither text nor link.
"""

import re

# How smalldocs writes a cell's code, and what stays of it
OPEN = re.compile(
    r'<div class="code-copy-outer-scaffold"><div class="sourceCode" id="cb\d+">'
    r'<pre class="sourceCode python code-with-copy cell-code">'
    r'<code class="sourceCode python">(.*?)</code></pre></div>'
    r'<button title="Copy to Clipboard" class="code-copy-button">'
    r'<i class="bi"></i></button></div>',
    re.S,
)
BARE = r'<div class=sourceCode><pre class=sourceCode><code class=sourceCode>'
TAG = re.compile(
    r'(<(script|style|svg|textarea)\b.*?</\2>|<(?:[^<>"\']|"[^"]*"|\'[^\']*\')*>)', re.S
)
SCRIPT = re.compile(r'<script src="([./]*)site_libs/smalldocs\.js" defer>')
SECTION = re.compile(
    r'<li class="sidebar-item sidebar-item-section"><div class="sidebar-item-container">'
    r'<a [^>]*data-bs-toggle="collapse"[^>]*aria-expanded="true"[^>]*>([^<]*)</a>'
    r'<a class="sidebar-item-toggle [^>]*><i [^>]*></i></a></div>'
    r'<ul id="quarto-sidebar-section-\d+" class="collapse [^"]* show">'
)


def short(page: str) -> str:
    """A page of smalldocs with its code, sidebar and text in few bytes, and the script
    that puts back what only a script uses.
    """
    page = OPEN.sub(rf'{BARE}\1</code></pre></div>', marks(page))
    page = re.sub(r'<nav id="quarto-sidebar".*?</nav>', sidebar, page, flags=re.S)
    own = r'<script src="\1style/page.js" defer></script>'
    return plain_text(SCRIPT.sub(lambda m: m.expand(own) + m[0], page))


def marks(page: str) -> str:
    """The marks of code, ten thousand on a page: operators have none, strings are `i`,
    keywords `b`, numbers and types `u`, all others an `i` with a class.
    """
    page = re.sub(r'<span class="op">([^<]*)</span>', r'\1', page)
    for names, tag in (('st|ch|ss', 'i'), ('kw|cf', 'b'), ('dv|fl|bn|dt|er|pp', 'u')):
        mark = rf'<span class="(?:{names})">([^<]*)</span>'
        page = re.sub(mark, rf'<{tag}>\1</{tag}>', page)
    page = page.replace('</i><i>', '')
    return re.sub(r'<span class="(\w\w)">([^<]*)</span>', r'<i class=\1>\2</i>', page)


def sidebar(nav) -> str:
    """The match of a sidebar, which lists all chapters on every page, as plain lists: a
    part's name is `b`, a link has no class but on its own page.
    """
    text = re.sub(r'<span class="menu-text">([^<]*)</span>', r'\1', nav[0])
    box = r'<div class="sidebar-item-container">(<a href=[^>]*>[^<]*</a>)</div>'
    text = SECTION.sub(r'<li><b>\1</b><ul>', re.sub(box, r'\1', text))
    link = r'(<a href="[^"]*") class="sidebar-item-text sidebar-link">([^<]*</a>)'
    text = re.sub(rf'<li class="sidebar-item">{link}</li>', r'<li>\1>\2', text)
    return text.replace('<li class="sidebar-item">', '<li>').replace('</ul></li>', '</ul>')


def plain_text(page: str) -> str:
    "A page whose text, outside of tags, scripts and drawings, holds quotes as they are."
    plainly = {'&#x27;': "'", '&quot;': '"', '&gt;': '>'}
    parts = TAG.split(page)
    for k in range(0, len(parts), 3):  # text, a tag, the name of a tag that holds no text
        parts[k] = re.sub('&#x27;|&quot;|&gt;', lambda m: plainly[m[0]], parts[k])
    return ''.join(p for k, p in enumerate(parts) if k % 3 < 2)


def drawing(svg: str) -> str:
    """A drawing of Matplotlib with places to a hundredth of a point, its paths in one line,
    its fonts named once, no turn by nothing, and without what it says of itself.
    """
    svg = re.sub(r'<metadata>.*?</metadata>\s*', '', svg, flags=re.S)
    svg = re.sub(r' transform="rotate\(-?0 [^)]*\)"', '', svg)
    place = re.compile(r'( (?:d|x|y|width|height|points)="|(?:translate|rotate)\()([^")]*)')
    svg = place.sub(lambda m: m[1] + numbers(m[2]), svg)
    fonts = re.findall(r'font-family: [^;"]*(?:&[^;"]*;[^;"]*)*; ', svg)
    if fonts:
        usual = max(dict.fromkeys(fonts), key=fonts.count)
        svg = svg.replace(usual, '').replace('<svg ', f'<svg style="{usual[:-2]}" ', 1)
    return svg


def numbers(path: str) -> str:
    "The commands of a path without the digits and spaces that nobody sees."
    near = lambda m: f'{round(float(m[0]), 2) + 0.0:.2f}'.rstrip('0').rstrip('.')
    path = re.sub(r'-?\d+\.\d{3,}(?!\d*e)', near, path)
    return re.sub(r'\s*([A-Za-z])\s*', r'\1', path).strip()


def used_icons(folder):
    "Keep, of the two thousand icons' names, those that a page, a style or a script has."
    sheets = list(folder.rglob('bootstrap-icons.min.css'))
    kinds = ('*.html', '*.js', '*.css')
    texts = (f for kind in kinds for f in folder.rglob(kind) if f not in sheets)
    used = {n for f in texts for n in re.findall(r'\bbi-[\w-]+', f.read_text('utf-8'))}
    rule = re.compile(r'\.(bi-[\w-]+)::before\{content:"[^"]*"\}')
    for css in sheets:
        kept = rule.sub(lambda m: m[0] if m[1] in used else '', css.read_text('utf-8'))
        css.write_text(kept, encoding='utf-8')
