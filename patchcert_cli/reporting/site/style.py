"""How the page looks: one style sheet for light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fdfdfb; --raised: #f5f6f4; --ink: #1f2933; --soft: #55616b; --line: #d9dee3; --rule: #8a96a0;
  --accent: #1f6484; --good: #1c6b4a; --bad: #a5361b; --paper: #9a4a16; --shade: rgb(31 41 51 / 16%);
  --hue0: #0072b2; --hue1: #b95600; --hue2: #007f5f; --hue3: #a8477f; --hue4: #8a6d00; --hue5: #3c4a9c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181c; --raised: #1c2227; --ink: #e2e7eb; --soft: #a0acb6; --line: #2f383f; --rule: #66727c;
    --accent: #82bcd9; --good: #7cc9a4; --bad: #f0937b; --paper: #e2a06f; --shade: rgb(0 0 0 / 55%);
    --hue0: #56b4e9; --hue1: #f2994a; --hue2: #3cc49a; --hue3: #e28bbd; --hue4: #d9c045; --hue5: #a3aef5;
  }
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 80rem; padding: 2.5rem 1.6rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; overflow-wrap: break-word;
}
h1, h2, h3, h4 { line-height: 1.25; font-weight: 600; margin: 0; }
h1 { font-size: 1.9rem; letter-spacing: -0.01em; }
h2 { font-size: 1.4rem; margin-top: 3.2rem; padding-bottom: 0.4rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; }
h4 { font-size: 0.95rem; margin: 1.6rem 0 0.5rem; }
p { margin: 0.6rem 0; }
p, li { max-width: 46rem; }
a { color: var(--accent); text-underline-offset: 0.15em; text-decoration-thickness: 0.06em; }
a:hover { text-decoration-thickness: 0.12em; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; border-radius: 2px; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.86em; }
.lead { font-size: 1.05rem; max-width: 48rem; }
.meta, .none, .short, figcaption, caption, .sources, footer { color: var(--soft); }
.meta { font-size: 0.9rem; }
figcaption b { font-weight: 600; color: var(--ink); }

.controls {
  display: flex; flex-wrap: wrap; gap: 0.8rem 1.4rem; align-items: end; margin-top: 2rem; padding: 0.9rem 1.1rem 1rem;
  background: var(--raised); border: 1px solid var(--line); border-radius: 6px;
}
.controls label { display: grid; gap: 0.25rem; font-size: 0.82rem; color: var(--soft); }
.controls select, .controls input {
  font: inherit; font-size: 0.95rem; color: var(--ink); background: var(--page); border: 1px solid var(--rule);
  border-radius: 4px; padding: 0.35rem 0.5rem; min-height: 2.3rem; min-width: 11rem; max-width: 100%;
}
#status { margin: 0 0 0.45rem; font-size: 0.88rem; color: var(--soft); }

.threat { margin-top: 2rem; }
.scroll { overflow-x: auto; margin-top: 0.5rem; }
.scroll {
  background:
    linear-gradient(to right, var(--page) 30%, transparent) left / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--page) 30%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 0.7rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 0.7rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: 0.9rem; line-height: 1.4; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; font-size: 0.88rem; padding-bottom: 0.5rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(46rem, calc(100vw - 3rem)); }
th, td { text-align: left; vertical-align: top; padding: 0.45rem 0.5rem; font-weight: 400; }
thead th { vertical-align: bottom; font-weight: 600; font-size: 0.82rem; color: var(--soft); }
thead tr:first-child th { border-top: 1.5px solid var(--rule); }
thead tr:last-child th, thead th[rowspan] { border-bottom: 1px solid var(--rule); }
thead th[colspan] { text-align: center; padding-bottom: 0; }
thead th.group { padding-top: 0.2rem; }
tbody tr { border-bottom: 1px solid var(--line); }
tbody tr:last-child { border-bottom: 1.5px solid var(--rule); }
.board tbody tr:hover { background: color-mix(in srgb, var(--accent) 7%, transparent); }
.number { text-align: right; }
td.number, .board th.number { white-space: nowrap; }
.rank { color: var(--soft); }
.model { white-space: nowrap; }
.model a { font-weight: 600; text-decoration: none; }
.model a:hover { text-decoration: underline; }
.network { min-width: 11rem; }
.measured .share { font-size: 1rem; }
.measured .below { display: block; font-size: 0.78rem; color: var(--soft); }
.published { color: var(--paper); }
.mark, .sources sup { font-size: 0.72em; padding-left: 0.15em; line-height: 0; }
.sources { font-size: 0.85rem; margin-top: 0.5rem; }
.sources p { margin: 0; }
.sources li { max-width: none; }
.sources ul { margin: 0.1rem 0 0; padding: 0; list-style: none; }
.sources sup { color: var(--paper); padding: 0 0.2em 0 0; }

th button {
  all: unset; font: inherit; color: inherit; cursor: pointer; position: relative; padding: 0.15rem 0.8rem 0.15rem 0;
}
.number button { padding: 0.15rem 0 0.15rem 0.7rem; }
th button:hover { color: var(--ink); }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th button::after { content: ""; position: absolute; right: 0.1rem; top: 50%; border: 0.24rem solid transparent; opacity: 0; }
.number button::after { right: auto; left: 0.1rem; }
th button:hover::after { border-top-color: currentColor; translate: 0 -25%; opacity: 0.5; }
[aria-sort] button { color: var(--ink); }
[aria-sort] button::after { opacity: 1 !important; }
[aria-sort="descending"] button::after { border-top-color: currentColor; translate: 0 -25%; }
[aria-sort="ascending"] button::after { border-color: transparent transparent currentColor !important; translate: 0 -75%; }

.badge {
  display: inline-block; font-size: 0.74rem; font-weight: 500; line-height: 1.3; padding: 0.1rem 0.45rem; border-radius: 3px;
  border: 1px solid currentColor; color: var(--soft); vertical-align: 0.08em; white-space: nowrap;
}
.badge.good { color: var(--good); }
.badge.bad { color: var(--bad); }

.curves {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr));
  gap: 2.2rem 2.5rem; margin-top: 2.4rem;
}
figure { margin: 0; max-width: 47.5rem; min-width: 0; }
.plot { overflow: hidden; }
.plot svg { display: block; width: 100%; height: auto; }
.plot text { font-size: 13px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); stroke-width: 1; }
.base { stroke: var(--rule); stroke-width: 1; }
.hue0 { color: var(--hue0); } .hue1 { color: var(--hue1); } .hue2 { color: var(--hue2); }
.hue3 { color: var(--hue3); } .hue4 { color: var(--hue4); } .hue5 { color: var(--hue5); }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.clean { fill: none; stroke: currentColor; stroke-width: 1.4; stroke-dasharray: 5 4; opacity: 0.8; }
.bar { stroke: currentColor; stroke-width: 1.4; }
svg .mark { fill: currentColor; stroke: var(--page); stroke-width: 1.2; }
.reach { fill: transparent; }
.leader { fill: none; stroke: currentColor; stroke-width: 0.8; opacity: 0.6; }
.plot .label text { fill: currentColor; font-weight: 600; font-size: 12.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.3rem; margin: 0.5rem 0; padding: 0; list-style: none; font-size: 0.9rem; }
.legend li { display: flex; align-items: center; gap: 0.45rem; }
.swatch { width: 28px; height: 14px; flex: none; }
.legend a { color: var(--ink); text-decoration: none; }
.legend a:hover { text-decoration: underline; }
figcaption { font-size: 0.88rem; max-width: 46rem; }

.card { border-bottom: 1px solid var(--line); }
.card summary { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0.2rem 0.8rem; padding: 0.7rem 0; cursor: pointer; }
.card summary::before { content: ""; border: 0.3rem solid transparent; border-left-color: var(--soft); margin-right: -0.5rem; }
.card[open] > summary::before { border-color: var(--soft) transparent transparent; translate: -0.15rem 0.15rem; }
.card summary::-webkit-details-marker { display: none; }
.card summary:hover h3 { color: var(--accent); }
.short { font-size: 0.9rem; }
.body { padding: 0 0 2rem 1.1rem; }
.reason { color: var(--bad); }
.facts { margin: 0.8rem 0; font-size: 0.92rem; }
.facts div { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 0 1rem; padding: 0.18rem 0; }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.results th, .results td, .files th, .files td { padding: 0.3rem 0.7rem; }
.results tbody th, .results tbody td, .files tbody td { white-space: nowrap; }
.results td .below { display: inline-block; min-width: 5.6rem; }
.results .below + .below { min-width: 7.4rem; }
.results .share { display: inline-block; min-width: 3rem; font-size: inherit; }
pre {
  margin: 0; padding: 0.7rem 4.6rem 0.7rem 0.9rem; background: var(--raised); border: 1px solid var(--line); border-radius: 5px;
  white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5;
}
.how { margin-top: 1rem; }
.how p { margin: 0.8rem 0 0.3rem; font-size: 0.9rem; }
.copyable { position: relative; max-width: 60rem; }
.copy {
  position: absolute; right: 0.45rem; top: 0.45rem; font: inherit; font-size: 0.78rem; color: var(--soft); cursor: pointer;
  background: var(--page); border: 1px solid var(--line); border-radius: 4px; padding: 0.15rem 0.5rem;
}
.copy:hover { color: var(--ink); border-color: var(--rule); }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 0.88rem; }

@media (max-width: 46rem) {
  body { padding: 1.4rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .controls label, .controls select, .controls input { width: 100%; }
  .facts div { grid-template-columns: 1fr; padding: 0.3rem 0; }
  .body { padding-left: 0; }
  .board th, .board td { padding-left: 0.3rem; padding-right: 0.4rem; }
  .board .model { white-space: normal; min-width: 7rem; }
  .plot svg { width: 133%; }
  .plot text { font-size: 20px; }
  .plot .label { display: none; }
  .clean, .line { stroke-width: 2.6; }
}
@media print {
  .controls, .copy { display: none; }
  .scroll { overflow: visible; }
}
"""
