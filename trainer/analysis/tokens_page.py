"""A self-contained HTML page of example tokens, each colored by its leading expert."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_STYLE = """
body { font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; line-height: 1.8; }
.tokens span, .legend span { padding: 1px 0; border-radius: 2px; }
.legend span { padding: 2px 6px; margin-right: 4px; }
[data-learned] { text-decoration: underline; }
"""
_SCRIPT = """
const view = document.getElementById("view");
view.onchange = () => {
  for (const token of document.querySelectorAll("[data-leads]"))
    token.className = "e" + token.dataset.leads.split(" ")[view.value];
};
"""


@dataclass(frozen=True)
class Example:
    """texts: one per token. learned [tokens]: whether a token is labelled. weights [views, tokens, experts]: omega."""

    task: str
    texts: Sequence[str]
    learned: np.ndarray
    weights: np.ndarray


def tokens_page(title: str, examples: Sequence[Example], views: Sequence[str]) -> str:
    """views: what each view's weights are averaged over, such as a layer; the page opens with the first."""
    experts = examples[0].weights.shape[2]
    colors = "\n".join(f".e{i} {{ background: hsl({360 * i // experts} 75% 82%); }}" for i in range(experts))
    options = "".join(f'<option value="{i}">{escape(view)}</option>' for i, view in enumerate(views))
    legend = "".join(f'<span class="e{i}">expert {i}</span>' for i in range(experts))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{colors}\n</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<p>A token's color shows the expert with the largest weight. Underlined tokens are learned. "
        f"Hover over a token to see its mean weights over {escape(views[0])}. "
        f'Color by <select id="view">{options}</select></p>\n<p class="legend">{legend}</p>\n'
        f"{''.join(map(_section, examples))}<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(example: Example) -> str:
    leads = example.weights.argmax(2)
    tokens = "".join(
        f'<span class="e{leads[0, i]}" data-leads="{" ".join(map(str, leads[:, i]))}"'
        f"{' data-learned' if example.learned[i] else ''} "
        f'title="{" ".join(f"{weight:.2f}" for weight in example.weights[0, i])}">{escape(text)}</span>'
        for i, text in enumerate(example.texts)
    )
    return f'<h2>{escape(example.task)}</h2>\n<div class="tokens">{tokens}</div>\n'
