"""The contents of a PNG: the texts of the figure that it was written from, and the colours of the file's own pixels."""
import io

import numpy as np


class Map:
    """A grid of coloured cells in a picture: labels as they are drawn, rows from the top, columns from the left."""

    def __init__(self, picture, axes):
        self.picture, self.axes = picture, axes
        self.title = axes.get_title() or axes.get_title(loc="left")
        (self.rows, self.downs), (self.columns, self.acrosses) = map(labels, (axes.yaxis, axes.xaxis))
        self.texts = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}

    def text(self, row, column):
        """The text of a cell, by the labels of its row and column or by their numbers."""
        down, across = place(row, self.rows, self.downs), place(column, self.columns, self.acrosses)
        return self.texts[round(down), round(across)]

    def colour(self, row, column):
        """The colour of a cell, three pixels from its upper left corner, where its text is not: [red, green, blue]."""
        down, across = place(row, self.rows, self.downs), place(column, self.columns, self.acrosses)
        high, wide = (np.diff(at[:2]).item() if len(at) > 1 else 1 for at in (self.downs, self.acrosses))
        return self.picture.pixel(self.axes, across - wide / 2, down - high / 2, (3, 3))


def labels(axis):
    """(texts, places) of the ticks of an axis, in the order of their places."""
    ticks = sorted(zip(axis.get_ticklocs(), (text.get_text() for text in axis.get_ticklabels()), strict=True))
    return [text for _, text in ticks], [float(at) for at, _ in ticks]


def place(which, names, places):
    """The place of a row or a column, by its label or by its number."""
    return places[names.index(which) if isinstance(which, str) else which]


class Picture:
    """One PNG and the figure of matplotlib that it was written from."""

    def __init__(self, figure, png):
        from matplotlib.image import imread
        from matplotlib.text import Text

        self.figure, self.pixels = figure, (imread(io.BytesIO(png))[..., :3] * 255).round().astype(int)
        self.words = [t.get_text() for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
        self.maps = [Map(self, axes) for axes in figure.axes if axes.images]

    def pixel(self, axes, x, y, further=(0, 0)):
        """The colour at a place given in the units of the axes, and as many pixels further to the right and down."""
        across, up = axes.transData.transform((x, y))
        return self.pixels[len(self.pixels) - 1 - int(up) + further[1], int(across) + further[0]].tolist()


class Pictures:
    """Calls: the Picture in a PNG that was written since this was made."""

    def __init__(self, monkeypatch):
        from matplotlib.figure import Figure

        self.figures, save = {}, Figure.savefig

        def savefig(figure, file, **how):
            save(figure, png := io.BytesIO(), **how)
            self.figures[png.getvalue()] = figure
            file.write(png.getvalue())

        monkeypatch.setattr(Figure, "savefig", savefig)

    def __call__(self, path):
        with open(path, "rb") as f:
            png = f.read()
        return Picture(self.figures[png], png)


NOT_THERE = [225, 225, 225]     # a cell without a number


def colour(value, low, high, diverging=False):
    """The colour of a number by the tables of lab/pictures/colours.py, interpolated anew: [red, green, blue]."""
    from tinymia_lab.pictures import colours

    table = [[*bytes.fromhex(c)] for c in (colours.DIVERGING if diverging else colours.SEQUENTIAL).split()]
    place = (float(value) - low) / (high - low) * (len(table) - 1)
    return [round(np.interp(place, range(len(table)), c).item()) for c in zip(*table)]
