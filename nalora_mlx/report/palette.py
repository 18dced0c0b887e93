"""Colours of runs, regions and heat maps, for the page and the pictures.

Okabe and Ito's set, which colour-blind readers tell apart, darkened for a light ground and lightened for a dark one
until a line of it stands out from the ground by 3:1; shapes of markers say the same again.
"""

RUNS_LIGHT = ("#0072b2", "#d55e00", "#008a64", "#b8558c", "#8a6800", "#3d3d8f", "#7a3b10", "#555555")
RUNS_DARK = ("#56b4e9", "#f5a742", "#34c99b", "#e59ac4", "#f0e442", "#a9a9f5", "#e08a58", "#c8c8c8")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "pentagon", "hexagon")
HEAT = "cividis"  # light and dark alone say what it says, and it has no red or green
MOST_RUNS = len(RUNS_LIGHT)
