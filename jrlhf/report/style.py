"""How the report looks: light and dark, wide and narrow, on a screen and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #68707d; --rule: #dde1e7; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6eb; --soft: #98a1ae; --rule: #363c46; --paper: #16191e } }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem }
h1 + p { color: var(--soft); font-size: 13px }
table { border-collapse: collapse } .wide { overflow-x: auto }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--rule);
  white-space: pre-wrap; overflow-wrap: anywhere; min-width: 4rem }
th { font-weight: 600; color: var(--soft) }
.figures th:nth-child(n+3), .figures td:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums }
.samples td { min-width: 14rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem 1.5rem }
figure { margin: 0; min-width: 0 }
details { margin: 1rem 0 } summary { cursor: pointer; color: var(--soft) } pre { overflow-x: auto; font-size: 13px }
@media print { body { margin: 0; max-width: none; font-size: 11px } figure, tr { break-inside: avoid }
  h2, h3 { break-after: avoid } .charts { grid-template-columns: 1fr 1fr } }
"""
