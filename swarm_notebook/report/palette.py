"""The colours of pictures and widgets, decided once.

Two ends of one scale for what has a sign: blue above 0, orange below. No form of colour blindness
takes one for the other, and both are equally light, so that neither sign looks stronger than the
other of the same size. A colour is laid over whatever the theme has below it, to at most `MOST`, so
the text on it keeps a contrast of 4.5 (WCAG's AA) in light and dark. What has no sign is blue
alone, darker or lighter. Lines of a chart have Okabe and Ito's hues (2008), darkened until they are
seen on white and on black. The parts of a time, which touch each other in a picture, are five hues
that keep a distance of 20 in CIE L*a*b* for each form of colour blindness.

`js/src/theme.css` and `monitor.css` repeat these for the widgets; a test holds them together, and
measures what is said here.
"""

PLUS, MINUS = "#2b7bd6", "#c4630a"
MOST = 0.62
TIMES = {
    "compute": PLUS,
    "queue": "#ba8e1b",
    "network": "#9d4c0a",
    "serialisation": "#de479d",
    "client": "#12a952",
}
SERIES = (PLUS, "#d9730d", "#1a936f", "#b05a9a", "#8a7a1d")
