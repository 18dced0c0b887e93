"""Colors, markers and dashes of runs, for the page and the plots.

The colors are Okabe and Ito's, adjusted so that each has a contrast of 3:1 to the background and any two stay distinct
with protanopia, deuteranopia and tritanopia. Dashes and markers distinguish the runs too.
"""

RUN_COLORS_LIGHT = ("#1e5b9c", "#da6b11", "#05925e", "#b3568a", "#3a2a5c", "#765305")
RUN_COLORS_DARK = ("#28aced", "#f9a35f", "#4ee6a9", "#dfa3ca", "#f0e442", "#5167c0")
MAX_RUNS = len(RUN_COLORS_LIGHT)
PLOTLY_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
PLOTLY_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MATPLOTLIB_MARKERS = ("o", "s", "D", "^", "P", "X")
MATPLOTLIB_DASHES = (
    *("-", (0, (5, 3)), (0, (1, 1.5))),
    *((0, (6, 2, 1, 2)), (0, (9, 3)), (0, (9, 2, 1, 2))),
)
COLORMAP = "cividis"  # readable by lightness alone, without red and green
REGION_POSITIONS = (0.1, 0.5, 0.9)  # on that colormap, for the regions of a partition from low z to high z
