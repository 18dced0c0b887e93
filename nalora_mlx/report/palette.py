"""Colours of runs, regions and heat maps, for the page and the pictures.

Okabe and Ito's set, moved until a line stands out from its ground by 3:1 and any two are far apart for readers with
protanopia, deuteranopia or tritanopia too; dashes and shapes of markers say the same again.
"""

RUNS_LIGHT = ("#1e5b9c", "#da6b11", "#05925e", "#b3568a", "#3a2a5c", "#765305")
RUNS_DARK = ("#28aced", "#f9a35f", "#4ee6a9", "#dfa3ca", "#f0e442", "#5167c0")
MOST_RUNS = len(RUNS_LIGHT)
# The same for plotly and for matplotlib.
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
POINTS = ("o", "s", "D", "^", "P", "X")
LINES = ("-", (0, (5, 3)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (9, 2, 1, 2)))
HEAT = "cividis"  # light and dark alone say what it says, and it has no red or green
REGIONS = (0.1, 0.5, 0.9)  # where on that scale the regions of a partition are, from low z to high z
