//! Draws the screen of a terminal as SVG.

use std::fmt::Write as _;

use ebb_testkit::terminal::vt100::{Cell, Color, Screen};

/// The size of a character, in pixels.
const WIDTH: f32 = 7.8;
const HEIGHT: u16 = 17;
/// The space around the text.
const MARGIN: u16 = 12;

const FOREGROUND: &str = "#d6d9e0";
const BACKGROUND: &str = "#16181d";
/// The colours that programs call by number: black, red, green, yellow, blue, magenta, cyan, white, and bright ones.
const PALETTE: [&str; 16] = [
    "#3b4048", "#f0716b", "#7fc97a", "#e3b866", "#6fa8f0", "#c58af0", "#5fc7cf", "#d6d9e0",
    "#6b7280", "#ff938c", "#a0e09b", "#f5d08a", "#94c1ff", "#dbaaff", "#8be3ea", "#ffffff",
];

/// How characters look.
#[derive(Clone, Copy, PartialEq)]
struct Look {
    foreground: Color,
    background: Color,
    bold: bool,
    dim: bool,
    underline: bool,
    inverse: bool,
}

impl Look {
    fn of(cell: &Cell) -> Self {
        Self {
            foreground: cell.fgcolor(),
            background: cell.bgcolor(),
            bold: cell.bold(),
            dim: cell.dim(),
            underline: cell.underline(),
            inverse: cell.inverse(),
        }
    }

    /// The colour of the text, and that behind it unless it is the terminal's own.
    fn colours(self) -> (String, Option<String>) {
        let foreground = colour(self.foreground).unwrap_or_else(|| FOREGROUND.into());
        let background = colour(self.background);
        match self.inverse {
            true => {
                let text = background.unwrap_or_else(|| BACKGROUND.into());
                (text, Some(foreground))
            }
            false => (foreground, background),
        }
    }
}

fn colour(colour: Color) -> Option<String> {
    match colour {
        Color::Default => None,
        Color::Idx(n) => PALETTE.get(usize::from(n)).map(|c| (*c).to_owned()),
        Color::Rgb(r, g, b) => Some(format!("#{r:02x}{g:02x}{b:02x}")),
    }
}

/// Characters beside each other that look the same.
struct TextRun {
    column: u16,
    look: Look,
    text: String,
}

/// The screen as an SVG document, without what is empty at its right and its end. Its title is the command.
pub(crate) fn svg(command: &str, screen: &Screen) -> String {
    let columns = screen.size().1;
    let rows: Vec<_> = screen.rows(0, columns).collect();
    let widths: Vec<_> = rows
        .iter()
        .map(|row| row.trim_end().chars().count())
        .collect();
    let used = widths
        .iter()
        .rposition(|width| *width > 0)
        .map_or(0, |last| last as u16 + 1);
    let columns = columns.min(widths.into_iter().max().unwrap_or_default() as u16);
    let (width, height) = (
        WIDTH * f32::from(columns) + 2.0 * f32::from(MARGIN),
        (used + 2) * HEIGHT + 2 * MARGIN,
    );
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height}\" width=\"{width:.0}\" \
         font-family=\"ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace\" font-size=\"13\">\n\
         <title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"{BACKGROUND}\"/>\n\
         <g xml:space=\"preserve\" fill=\"{FOREGROUND}\">\n\
         <text x=\"{MARGIN}\" y=\"{y}\" fill=\"{grey}\">$ {title}</text>\n",
        title = escaped(command),
        y = MARGIN + HEIGHT - 5,
        grey = PALETTE[8],
    );
    for row in 0..used {
        let top = MARGIN + (row + 2) * HEIGHT;
        for run in runs(screen, row, columns) {
            draw(&mut out, &run, top);
        }
    }
    out + "</g>\n</svg>\n"
}

fn runs(screen: &Screen, row: u16, columns: u16) -> Vec<TextRun> {
    let mut runs: Vec<TextRun> = vec![];
    for column in 0..columns {
        let Some(cell) = screen.cell(row, column) else {
            continue;
        };
        let look = Look::of(cell);
        let text = match cell.contents() {
            "" => " ",
            text => text,
        };
        match runs.last_mut() {
            Some(run) if run.look == look => run.text.push_str(text),
            _ => runs.push(TextRun {
                column,
                look,
                text: text.to_owned(),
            }),
        }
    }
    runs
}

fn draw(out: &mut String, run: &TextRun, top: u16) {
    let x = |column: usize| f32::from(MARGIN) + WIDTH * column as f32;
    let (colour, behind) = run.look.colours();
    let all = run.text.chars().count();
    let start = usize::from(run.column);
    // Writing to a string does not fail.
    if let Some(behind) = behind {
        let (x, width) = (x(start), WIDTH * all as f32);
        let _ = writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{HEIGHT}\" fill=\"{behind}\"/>",
            top - HEIGHT
        );
    }
    let mut style = String::new();
    if colour != FOREGROUND {
        let _ = write!(style, " fill=\"{colour}\"");
    }
    if run.look.bold {
        style.push_str(" font-weight=\"bold\"");
    }
    if run.look.dim {
        style.push_str(" opacity=\".6\"");
    }
    if run.look.underline {
        style.push_str(" text-decoration=\"underline\"");
    }
    for (before, text) in words(&run.text) {
        // The length keeps columns aligned in a font whose characters have another width.
        let length = WIDTH * text.chars().count() as f32;
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" textLength=\"{length:.1}\"{style}>{}</text>",
            x(start + before),
            top - 5,
            escaped(text)
        );
    }
}

/// The parts of a text between two or more spaces, each with how many characters are before it.
fn words(text: &str) -> Vec<(usize, &str)> {
    let mut at = 0;
    let parts = text.split("  ").map(|part| {
        let before = at + part.chars().take_while(|c| *c == ' ').count();
        at += part.chars().count() + 2;
        (before, part.trim())
    });
    parts.filter(|(_, part)| !part.is_empty()).collect()
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use ebb_testkit::terminal::vt100::Parser;

    use super::*;

    #[test]
    fn each_run_of_equal_characters_is_one_text() {
        let mut parser = Parser::new(5, 20, 0);
        parser.process(b"a  b<c \x1b[1;32mgreen\x1b[0m\r\n\r\n  \x1b[7mback\x1b[0m\r\n");
        let svg = svg("x > y", parser.screen());
        for part in [
            "<title>x &gt; y</title>",
            "<text x=\"12.0\" y=\"41\" textLength=\"7.8\">a</text>",
            "<text x=\"35.4\" y=\"41\" textLength=\"23.4\">b&lt;c</text>",
            "fill=\"#7fc97a\" font-weight=\"bold\">green</text>",
            "fill=\"#16181d\">back</text>",
            "width=\"31.2\" height=\"17\" fill=\"#d6d9e0\"/>",
        ] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert_eq!(svg.matches("<text").count(), 5, "with the command: {svg}");
    }
}
