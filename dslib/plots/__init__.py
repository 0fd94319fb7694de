"""All figures of the book, and the panes whose sliders work without a kernel.

networks       Figures of networks, masks and accuracies. Functions take data and return a Figure.
search         Figures of searching and planning. Functions take data and return a Figure; axes carry units.
speed          Figures of what was measured on a device. Functions take data and return a Figure.
training       Figures of training.
widgets        Sliders that work in the static page, with no kernel, and compute live with one.
"""
