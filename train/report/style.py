"""The report's style sheet: the gallery's palette, light and dark, wide and narrow."""

STYLE = """
:root { --ink: #1c2330; --muted: #626c7d; --page: #f5f6f8; --card: #ffffff; --line: #dfe3ea; --good: #1f7a4d;
  --good-back: #e2f3ea; --bad: #b3403a; --bad-back: #fae7e5; --same-back: #eceff3;
  --run-0: #2f6fdb; --run-1: #d9822b; --run-2: #1f9a70; --run-3: #8a5cd1; --run-4: #c7427d; --run-5: #4d7d8f;
  --part-0: #c7427d; --part-1: #2f6fdb; --part-2: #1f9a70; --part-3: #7aa9f7; --part-4: #d9822b; --part-5: #8a5cd1;
  --part-6: #e0c341; --part-7: #98a2b3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --muted: #98a2b3; --page: #14171c; --card: #1d2128; --line: #323843; --good: #6fce9f;
    --good-back: #1d3a2d; --bad: #ef8d87; --bad-back: #42211f; --same-back: #2a303a;
    --run-0: #7aa9f7; --run-1: #efa65a; --run-2: #5fcaa0; --run-3: #b795f0; --run-4: #f08bb8; --run-5: #8fbccd; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
body > main, body > header { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
body > header { padding-top: 36px; }
body > main { padding-bottom: 64px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 4px; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 48px 0 12px; }
h3 { font-size: 16px; margin: 20px 0 6px; }
h3 small { color: var(--muted); font-weight: 400; margin-left: 6px; }
p { max-width: 80ch; margin: 0 0 14px; }
.lead, .note, .lack { color: var(--muted); }
.note, .lack { font-size: 14px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 14px; }
nav a { color: var(--run-0); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.verdict { font-size: 16px; font-weight: 600; }
.gallery section h2 { font-size: 16px; margin-top: 24px; }
.missing { border: 1px solid var(--line); border-left: 4px solid var(--run-1); border-radius: 6px; background: var(--card);
  padding: 12px 16px; margin: 20px 0 0; font-size: 14px; overflow-wrap: anywhere; }
.missing h2 { font-size: 14px; margin: 0 0 4px; }
.missing ul { margin: 0; padding-left: 18px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; margin: 14px 0 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card .what { color: var(--muted); font-size: 13px; }
.card .big { font-size: 25px; font-weight: 650; letter-spacing: -.02em; margin: 2px 0 6px;
  font-variant-numeric: tabular-nums; }
.pill { display: inline-block; white-space: nowrap; border-radius: 20px; padding: 2px 10px; font-size: 12px;
  font-variant-numeric: tabular-nums; }
.pill.better { background: var(--good-back); color: var(--good); }
.pill.worse { background: var(--bad-back); color: var(--bad); }
.pill.same { background: var(--same-back); color: var(--muted); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
th:first-child { text-align: left; }
thead th { font-size: 13px; color: var(--muted); font-weight: 600; }
tbody th { font-weight: 400; }
td small { color: var(--muted); font-size: 12px; }
tr.kind th { font-weight: 650; font-size: 13px; padding-top: 14px; }
td.muted { color: var(--muted); }
td.better { color: var(--good); }
td.worse { color: var(--bad); }
td.same { color: var(--muted); }
td.word { text-align: left; padding-left: 0; font-size: 13px; }
table.runs td { white-space: normal; overflow-wrap: anywhere; min-width: 150px; text-align: left; vertical-align: top; }
table.runs th { text-align: left; vertical-align: top; }
table.runs tbody th { color: var(--muted); }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px; vertical-align: -1px; }
.keys { display: flex; flex-wrap: wrap; gap: 6px 20px; margin-bottom: 12px; font-size: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); gap: 14px;
  margin-bottom: 16px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 12px 8px; }
.chart.wide { border: 0; padding: 14px 16px 8px; min-width: 640px; max-width: 980px; }
.chart figcaption { font-size: 14px; font-weight: 600; margin: 0 4px 6px; }
.chart figcaption .note { font-weight: 400; font-size: 12px; display: block; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg text { fill: var(--muted); font: 12px system-ui, -apple-system, "Segoe UI", sans-serif;
  font-variant-numeric: tabular-nums; }
.chart svg text.row { fill: var(--ink); font-size: 13px; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--muted); stroke-width: 1.2; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.bar { fill: var(--run-0); }
.whisker { stroke-width: 3; stroke-linecap: round; opacity: .55; }
.whisker.better { stroke: var(--good); } .whisker.worse { stroke: var(--bad); } .whisker.same { stroke: var(--muted); }
.mark.better { fill: var(--good); } .mark.worse { fill: var(--bad); } .mark.same { fill: var(--muted); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px 24px; margin: 0 0 18px; }
.facts dt { color: var(--muted); font-size: 12px; }
.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  body > header { padding-top: 22px; }
  body > main, body > header { padding-left: 12px; padding-right: 12px; }
  th, td { padding: 6px 10px; }
}
@media print { body { background: none; } .scroll, .chart, .card { break-inside: avoid; } }
"""
