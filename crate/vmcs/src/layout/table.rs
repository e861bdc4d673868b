//! Layouts as text: a table that users can write themselves.
//!
//! Comma-separated, a header line, columns in any order, others ignored:
//!
//! ```text
//! kind,name,offset,width_bytes,value
//! layout,mine,,4096,              name, and bytes of a region
//! header,revision_id,0,4,0x1234   may be repeated; without it any revision is taken
//! header,launch_state,8,4,0 1     clear, launched and, if not every bit, the mask; may be left out
//! field,guest_rip,16,8,
//! field,guest_cs_ar_bytes,24,4,rotated
//! ```

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt::Write as _;

use super::{LaunchState, Layout, LayoutError, MAX_SIZE, Slot};
use crate::field::Field;

/// A table that is no layout: the line, counted from 1, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct TableError {
    /// The line, from 1; the last one if the whole makes no sense.
    pub line: usize,
    /// What is wrong.
    pub problem: TableProblem,
}

/// What is wrong with a table.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableProblem {
    /// The header line lacks a column.
    #[error("the header line has no column {0}")]
    Column(&'static str),
    /// A row has fewer cells than the columns need.
    #[error("the row ends before column {0}")]
    Cell(&'static str),
    /// A cell holds no number, or one that is too large.
    #[error("{0}: {1:?} is not a number that fits")]
    Number(&'static str, String),
    /// A row of a kind that nobody knows.
    #[error(
        "unknown kind {0:?}: layout, header, field; padding, retired, internal, synthetic and tail are ignored"
    )]
    Kind(String),
    /// No field has that name.
    #[error("no VMCS field is called {0:?}")]
    Field(String),
    /// There is no row of kind `layout`, or two.
    #[error("a table has one row of kind layout")]
    Name,
    /// A name is empty, long or has characters that would have to be quoted.
    #[error("a layout's name has 1 to 40 letters, digits, dots or dashes")]
    BadName,
    /// A launch state is not `clear launched [mask]`.
    #[error("a launch state's value is: clear launched [mask]")]
    Launch,
    /// The parts make no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

struct Columns {
    kind: usize,
    name: usize,
    offset: usize,
    width: usize,
    value: Option<usize>,
}

impl Columns {
    fn of(head: &str) -> Result<Self, TableProblem> {
        let names: Vec<&str> = head.split(',').map(str::trim).collect();
        let find = |name| names.iter().position(|there| *there == name);
        let need = |name| find(name).ok_or(TableProblem::Column(name));
        Ok(Self {
            kind: need("kind")?,
            name: need("name")?,
            offset: need("offset")?,
            width: need("width_bytes")?,
            value: find("value"),
        })
    }
}

/// A number, hexadecimal after `0x`.
fn number(column: &'static str, cell: &str) -> Result<u32, TableProblem> {
    let parsed = match cell.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => cell.parse(),
    };
    parsed.map_err(|_| TableProblem::Number(column, cell.chars().take(40).collect()))
}

fn small<T: TryFrom<u32>>(column: &'static str, cell: &str) -> Result<T, TableProblem> {
    T::try_from(number(column, cell)?).map_err(|_| TableProblem::Number(column, cell.to_owned()))
}

#[derive(Default)]
struct Parts {
    layout: Option<(String, usize)>,
    revisions: Vec<u32>,
    launch: Option<LaunchState>,
    slots: Vec<Slot>,
}

impl Parts {
    fn row(&mut self, columns: &Columns, line: &str) -> Result<(), TableProblem> {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let cell = |at: usize, name| cells.get(at).copied().ok_or(TableProblem::Cell(name));
        let name = cell(columns.name, "name")?;
        let value = columns.value.and_then(|at| cells.get(at)).unwrap_or(&"");
        let offset = || small("offset", cell(columns.offset, "offset")?);
        let width = || cell(columns.width, "width_bytes");
        match (cell(columns.kind, "kind")?, name) {
            ("padding" | "retired" | "internal" | "synthetic" | "tail", _) => {}
            ("layout", _) => {
                let fits = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
                if name.is_empty() || name.len() > 40 || !name.chars().all(fits) {
                    return Err(TableProblem::BadName);
                }
                let size = match width()? {
                    "" => MAX_SIZE,
                    text => small::<u16>("width_bytes", text)?.into(),
                };
                if self.layout.replace((name.to_owned(), size)).is_some() {
                    return Err(TableProblem::Name);
                }
            }
            ("header", "revision_id" | "version_number") => {
                if !value.is_empty() {
                    self.revisions.push(number("value", value)?);
                }
            }
            ("header", "launch_state") => {
                let numbers: Vec<u32> = value
                    .split_whitespace()
                    .map(|text| number("value", text))
                    .collect::<Result<_, _>>()?;
                let (clear, launched, mask) = match numbers[..] {
                    [] => (0, 1, u32::MAX),
                    [clear, launched] => (clear, launched, u32::MAX),
                    [clear, launched, mask] => (clear, launched, mask),
                    _ => return Err(TableProblem::Launch),
                };
                self.launch = Some(LaunchState {
                    offset: offset()?,
                    width: small("width_bytes", width()?)?,
                    clear,
                    launched,
                    mask,
                });
            }
            ("header", "abort" | "abort_indicator") => {}
            ("field", _) => {
                let field = Field::ALL.into_iter().find(|f| f.short_name() == name);
                let field =
                    field.ok_or_else(|| TableProblem::Field(name.chars().take(60).collect()))?;
                let mut slot = Slot::new(field, offset()?, small("width_bytes", width()?)?);
                slot.rotated = *value == "rotated";
                self.slots.push(slot);
            }
            (kind, _) => return Err(TableProblem::Kind(kind.chars().take(40).collect())),
        }
        Ok(())
    }
}

impl Layout {
    /// Reads a table: one that [`to_table`](Self::to_table) made, or that someone wrote. Columns
    /// `kind`, `name`, `offset`, `width_bytes` and `value`; kinds `layout`, `header` and `field`.
    ///
    /// # Errors
    ///
    /// With the line, if the table is not well-formed or makes no layout.
    pub fn from_table(text: &str) -> Result<Self, TableError> {
        let mut parts = Parts::default();
        let mut columns = None;
        let mut last = 1;
        for (index, line) in text.lines().enumerate() {
            last = index + 1;
            let at = |problem| TableError {
                line: index + 1,
                problem,
            };
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            match &columns {
                None => columns = Some(Columns::of(line).map_err(at)?),
                Some(columns) => parts.row(columns, line).map_err(at)?,
            }
        }
        let end = |problem| TableError {
            line: last,
            problem,
        };
        if columns.is_none() {
            return Err(end(TableProblem::Column("kind")));
        }
        let (name, size) = parts.layout.ok_or_else(|| end(TableProblem::Name))?;
        Self::new(name, &parts.revisions, size, parts.launch, parts.slots)
            .map_err(|error| end(error.into()))
    }

    /// The table that [`from_table`](Self::from_table) reads.
    #[must_use]
    pub fn to_table(&self) -> String {
        let mut out = String::from("kind,name,offset,width_bytes,value\n");
        let mut row = |cells: [&str; 5]| {
            out.push_str(&cells.join(","));
            out.push('\n');
        };
        row(["layout", self.name(), "", &self.size().to_string(), ""]);
        for id in self.revisions() {
            row(["header", "revision_id", "0", "4", &format!("{id:#x}")]);
        }
        if let Some(launch) = self.launch_state() {
            let mut value = format!("{} {}", launch.clear, launch.launched);
            if launch.mask != u32::MAX {
                // Writing to a String cannot fail.
                let _ = write!(value, " {:#x}", launch.mask);
            }
            let (offset, width) = (launch.offset.to_string(), launch.width.to_string());
            row(["header", "launch_state", &offset, &width, &value]);
        }
        for slot in self.slots() {
            let (offset, width) = (slot.offset.to_string(), slot.width.to_string());
            let value = if slot.rotated { "rotated" } else { "" };
            row(["field", slot.field.short_name(), &offset, &width, value]);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_a_layout_is_the_layout() {
        for layout in Layout::built_in() {
            let again = Layout::from_table(&layout.to_table()).unwrap();
            assert_eq!(again.name(), layout.name());
            assert_eq!(again.slots(), layout.slots());
            assert_eq!(again.revisions(), layout.revisions());
            assert_eq!(again.launch_state(), layout.launch_state());
            assert_eq!((again.size(), again.used()), (layout.size(), layout.used()));
        }
    }

    const HEAD: &str = "kind,name,offset,width_bytes,value\nlayout,mine,,4096,\n";

    fn problem(rows: &str) -> (usize, TableProblem) {
        let error = Layout::from_table(&(HEAD.to_owned() + rows)).unwrap_err();
        (error.line, error.problem)
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        use TableProblem::{Cell, Column, Kind, Launch, Name, Number};
        let error = Layout::from_table("").unwrap_err();
        assert_eq!((error.line, error.problem), (1, Column("kind")));
        let error = Layout::from_table("kind,name,offset\n").unwrap_err();
        assert_eq!(error.problem, Column("width_bytes"));
        let error = Layout::from_table("kind,name,offset,width_bytes\n").unwrap_err();
        assert_eq!(error.problem, Name);
        assert_eq!(problem("layout,again,,,\n"), (3, Name));
        assert_eq!(problem("# words\n\nfield\n"), (5, Cell("name")));
        assert_eq!(problem("field,guest_rip\n"), (3, Cell("offset")));
        assert_eq!(
            problem("field,x,8,8\n"),
            (3, TableProblem::Field("x".into()))
        );
        assert_eq!(problem("what,x,8,8\n"), (3, Kind("what".into())));
        assert_eq!(
            problem("field,guest_rip,70000,8\n"),
            (3, Number("offset", "70000".into()))
        );
        assert_eq!(
            problem("field,guest_rip,-1,8\n"),
            (3, Number("offset", "-1".into()))
        );
        assert_eq!(problem("header,launch_state,8,4,1\n"), (3, Launch));
        let layout = |rows: &str| match problem(rows) {
            (_, TableProblem::Layout(error)) => error,
            other => panic!("{other:?}"),
        };
        assert_eq!(
            layout("header,launch_state,8,4,1 1\n"),
            LayoutError::LaunchValues
        );
        assert_eq!(
            layout("header,launch_state,8,5,\n"),
            LayoutError::LaunchWidth(5)
        );
        assert_eq!(
            layout("field,guest_rip,16,8\nfield,guest_rsp,20,8\n"),
            LayoutError::Overlap(20)
        );
        assert_eq!(
            layout("field,guest_rip,4092,8\n"),
            LayoutError::Outside(8, 4092)
        );
        assert_eq!(
            layout("field,guest_rip,16,8,rotated\n"),
            LayoutError::SlotWidth(Field::GUEST_RIP, 8)
        );
        assert_eq!(
            layout("header,revision_id,0,4,0x80000000\n"),
            LayoutError::WideRevision(1 << 31)
        );
        let error = Layout::from_table("kind,name,offset,width_bytes\nlayout,a b,,\n").unwrap_err();
        assert_eq!(error.problem, TableProblem::BadName);
        assert_eq!(
            error.to_string(),
            "line 2: a layout's name has 1 to 40 letters, digits, dots or dashes"
        );
        let text = "kind,name,offset,width_bytes\nlayout,big,,9000\n";
        assert!(matches!(
            Layout::from_table(text).unwrap_err().problem,
            TableProblem::Layout(LayoutError::Size(9000))
        ));
    }

    #[test]
    fn the_tables_of_the_project_need_only_a_name() {
        let table = include_str!("../../data/layout_xmhf_amd64.csv");
        let mut lines = table.lines();
        let text = format!(
            "{}\nlayout,xmhf\n{}",
            lines.next().unwrap(),
            lines.collect::<Vec<_>>().join("\n")
        );
        // The row of the layout ends early: its width is not there.
        assert_eq!(
            Layout::from_table(&text).unwrap_err().problem,
            TableProblem::Cell("width_bytes")
        );
        let text = text.replace("layout,xmhf\n", "layout,xmhf,,,\n");
        let read = Layout::from_table(&text).unwrap();
        assert_eq!(read.slots(), Layout::named("xmhf").unwrap().slots());
    }
}
