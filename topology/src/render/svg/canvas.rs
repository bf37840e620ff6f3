//! Elements of an SVG.

use std::fmt::{self, Write};

use crate::render::xml::Escaped;

/// A coordinate: at most one decimal.
#[derive(Clone, Copy, Debug)]
pub(super) struct N(pub f64);

impl fmt::Display for N {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:.1}", self.0);
        let text = text.strip_suffix(".0").unwrap_or(&text);
        f.write_str(if text == "-0" { "0" } else { text })
    }
}

/// Elements so far.
#[derive(Debug, Default)]
pub(super) struct Canvas {
    pub out: String,
}

impl Canvas {
    pub fn new() -> Canvas {
        Canvas::default()
    }

    /// Another canvas, moved.
    pub fn part(&mut self, (x, y): (f64, f64), part: &Canvas) -> fmt::Result {
        writeln!(self.out, "<g transform=\"translate({} {})\">", N(x), N(y))?;
        self.out.push_str(&part.out);
        self.close()
    }

    /// Begins a group that says what it is.
    pub fn open(&mut self, title: &str) -> fmt::Result {
        writeln!(self.out, "<g><title>{}</title>", Escaped(title))
    }

    /// Ends a group.
    pub fn close(&mut self) -> fmt::Result {
        writeln!(self.out, "</g>")
    }

    /// A rectangle: left, top, width, height.
    pub fn rect(&mut self, (x, y, w, h): (f64, f64, f64, f64), attributes: &str) -> fmt::Result {
        writeln!(
            self.out,
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" {attributes}/>",
            N(x),
            N(y),
            N(w),
            N(h)
        )
    }

    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), attributes: &str) -> fmt::Result {
        writeln!(
            self.out,
            "<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" {attributes}/>",
            N(from.0),
            N(from.1),
            N(to.0),
            N(to.1)
        )
    }

    /// A cubic curve.
    pub fn curve(&mut self, points: [(f64, f64); 4], attributes: &str) -> fmt::Result {
        let [from, a, b, to] = points.map(|(x, y)| format!("{} {}", N(x), N(y)));
        writeln!(
            self.out,
            "<path d=\"M{from} C{a} {b} {to}\" fill=\"none\" {attributes}/>"
        )
    }

    /// A text, its baseline at the point.
    pub fn text(&mut self, (x, y): (f64, f64), attributes: &str, text: &str) -> fmt::Result {
        writeln!(
            self.out,
            "<text x=\"{}\" y=\"{}\" {attributes}>{}</text>",
            N(x),
            N(y),
            Escaped(text)
        )
    }
}

/// About as wide as a text is.
pub(super) fn text_width(text: &str, size: f64) -> f64 {
    number(text.chars().count()) * size * 0.58
}

/// As much of a text as fits.
pub(super) fn fit(text: &str, width: f64, size: f64) -> String {
    if text_width(text, size) <= width {
        return text.to_owned();
    }
    let mut short: String = text.to_owned();
    while text_width(&short, size) > width - size && short.pop().is_some() {}
    short.push('…');
    short
}

/// A count as a coordinate; no picture has more than fits.
pub(super) fn number(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::from(u32::MAX), f64::from)
}
