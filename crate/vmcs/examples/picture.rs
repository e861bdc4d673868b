//! Draws where each layout has its fields, as an SVG on standard output:
//! `cargo run -p hypernest-vmcs --example picture > docs/layouts.svg`.

use std::fmt::{self, Display, Formatter};

use hypernest_vmcs::{Kind, Layout};

/// Bytes drawn: no layout uses more.
const BYTES: usize = 4096;
/// Bytes in a line of a strip, and pixels of a byte and of a line.
const LINE: usize = 512;
const BYTE_WIDTH: usize = 2;
const LINE_HEIGHT: usize = 5;
const LEFT: usize = 130;
const STRIP: usize = (BYTES / LINE) * LINE_HEIGHT + 16;

const COLOURS: [(Kind, &str, &str); 4] = [
    (Kind::Control, "#4477aa", "controls"),
    (Kind::ExitInfo, "#ccbb44", "exit information"),
    (Kind::GuestState, "#228833", "guest state"),
    (Kind::HostState, "#aa3377", "host state"),
];

struct Picture<'a>(&'a [&'a Layout]);

impl Display for Picture<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        let (width, height) = (LEFT + LINE * BYTE_WIDTH + 10, self.0.len() * STRIP + 40);
        writeln!(
            f,
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">"#
        )?;
        writeln!(f, r##"<rect width="100%" height="100%" fill="#fff"/>"##)?;
        for (n, (_, colour, name)) in COLOURS.iter().enumerate() {
            let x = LEFT + n * 170;
            writeln!(
                f,
                r#"<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/><text x="{}" y="19">{name}</text>"#,
                x + 18
            )?;
        }
        for (n, layout) in self.0.iter().enumerate() {
            strip(f, layout, 32 + n * STRIP)?;
        }
        writeln!(f, "</svg>")
    }
}

/// The bytes of one layout, in lines of [`LINE`].
fn strip(f: &mut Formatter, layout: &Layout, top: usize) -> fmt::Result {
    let lines = BYTES / LINE * LINE_HEIGHT;
    writeln!(
        f,
        r#"<text x="8" y="{}">{}</text>"#,
        top + 24,
        layout.name()
    )?;
    writeln!(
        f,
        r##"<rect x="{LEFT}" y="{top}" width="{}" height="{lines}" fill="#eee"/>"##,
        LINE * BYTE_WIDTH
    )?;
    for (kind, colour, _) in COLOURS {
        write!(f, r#"<path fill="{colour}" d=""#)?;
        for slot in layout.slots().iter().filter(|s| s.field.kind() == kind) {
            let offset = usize::from(slot.offset);
            let x = LEFT + offset % LINE * BYTE_WIDTH;
            let y = top + offset / LINE * LINE_HEIGHT;
            // A gap shows where one field ends.
            let (width, height) = (usize::from(slot.width) * BYTE_WIDTH - 1, LINE_HEIGHT - 1);
            write!(f, "M{x} {y}h{width}v{height}h-{width}z")?;
        }
        writeln!(f, r#""/>"#)?;
    }
    Ok(())
}

fn main() {
    print!("{}", Picture(Layout::built_in()));
}
