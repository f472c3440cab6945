"""matplotlib as every plot here uses it: drawing to files, with matplotlib's own settings.

The same file wherever plots are drawn: change one, copy it to the others; a test holds them equal.
"""

import os


def pyplot(**settings):
    """matplotlib.pyplot without a screen. settings: rcParams, with _ for dots, such as svg_hashsalt="curves".

    What the user has set for other work is not wanted here: MPLBACKEND as notebooks export it makes even the import
    fail, and a matplotlibrc may ask for LaTeX.
    """
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcdefaults()
    matplotlib.rcParams.update({name.replace("_", "."): value for name, value in settings.items()})
    import matplotlib.pyplot as plt

    return plt
