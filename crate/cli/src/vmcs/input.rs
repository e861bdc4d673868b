//! What a file holds: a raw region, KVM's nested state, or the log of a failed VM entry.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use hypernest_vmcs::{
    Candidate, Dump, FieldSet, Layout, NestedState, Vmcs, identify, nested_state, revision,
};

use crate::{files, setup};

/// A file with a VMCS in it.
pub enum Input {
    /// The bytes of a region.
    Region(Vec<u8>),
    /// `struct kvm_nested_state`.
    NestedState(Box<NestedState>),
    /// A kernel log.
    Log(Box<Dump>),
}

/// A VMCS, and what is known of where it came from.
pub struct Found {
    pub vmcs: Vmcs,
    /// `None`: a log, which has no layout.
    pub layout: Option<Layout>,
    /// The fields that the file has.
    pub fields: FieldSet,
}

/// Reads a file, `-` for standard input, and finds out what it is.
pub fn open(path: &Path) -> Result<Input> {
    let bytes = if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin()
            .lock()
            .take(MOST + 1)
            .read_to_end(&mut bytes)
            .context("cannot read the standard input")?;
        bytes
    } else {
        files::read("VMCS file", path)?
    };
    if bytes.len() as u64 > MOST {
        bail!(
            "{} has more than {MOST} bytes: give one region, nested state or log",
            path.display()
        );
    }
    detect(bytes).with_context(|| format!("{}", path.display()))
}

/// Logs of a kernel are long; nothing else is.
const MOST: u64 = 64 << 20;

fn detect(bytes: Vec<u8>) -> Result<Input> {
    if bytes.is_empty() {
        bail!("it is empty");
    }
    if let Ok(text) = std::str::from_utf8(&bytes)
        && text.contains("*** Guest State ***")
    {
        return Ok(Input::Log(Box::new(Dump::read(text)?)));
    }
    if let Ok(state) = NestedState::read(&bytes) {
        if state.image().is_none() {
            bail!("a nested state without a VMCS image");
        }
        return Ok(Input::NestedState(Box::new(state)));
    }
    if bytes.len() > nested_state::IMAGE {
        bail!(
            "{} bytes that are neither a region (at most 4096), nor a nested state, nor a log with \
             *** Guest State ***",
            bytes.len()
        );
    }
    Ok(Input::Region(bytes))
}

impl Input {
    /// In a word.
    pub fn kind(&self) -> &'static str {
        match self {
            Input::Region(_) => "region",
            Input::NestedState(_) => "nested state",
            Input::Log(_) => "log",
        }
    }

    /// The bytes of the region, where there are some.
    pub fn region(&self) -> Option<&[u8]> {
        match self {
            Input::Region(bytes) => Some(bytes),
            Input::NestedState(state) => state.image(),
            Input::Log(_) => None,
        }
    }

    /// The layouts it may be of, best first.
    pub fn candidates(&self) -> Vec<Candidate<'static>> {
        self.region().map_or(Vec::new(), |region| {
            identify(region, Layout::built_in().iter().copied())
        })
    }

    /// The layout: the one asked for, or the likeliest.
    pub fn layout(&self, asked: Option<&str>) -> Result<Option<Layout>> {
        let Some(region) = self.region() else {
            return Ok(None);
        };
        if let Some(asked) = asked {
            return layout(asked).map(Some);
        }
        let found = self.candidates();
        let best = found.first().ok_or_else(|| {
            let (id, _) = revision(region).unwrap_or_default();
            anyhow!(
                "{} bytes with revision {id:#010x} are of no known layout; name one with --layout",
                region.len()
            )
        })?;
        if !best.by_revision && best.broken.len() > GUESSED {
            let (id, _) = revision(region).unwrap_or_default();
            bail!(
                "revision {id:#010x} is of no known layout, and the values fit none well (best: {}, \
                 {} values that break a rule); name one with --layout",
                best.layout.name(),
                best.broken.len()
            );
        }
        Ok(Some(best.layout.clone()))
    }

    /// The VMCS.
    pub fn read(&self, asked: Option<&str>) -> Result<Found> {
        match (self, self.layout(asked)?) {
            (Input::Log(dump), _) => Ok(Found {
                vmcs: dump.vmcs.clone(),
                layout: None,
                fields: dump.fields,
            }),
            (_, Some(layout)) => {
                let region = self.region().unwrap_or_default();
                let vmcs = layout
                    .read(region)
                    .with_context(|| format!("not of layout {}", layout.name()))?;
                let fields = *layout.field_mask();
                Ok(Found {
                    vmcs,
                    layout: Some(layout),
                    fields,
                })
            }
            (_, None) => bail!("no layout"),
        }
    }
}

/// Broken rules that a region without a known revision may have and still be called one.
const GUESSED: usize = 2;

/// A built-in layout by name, or a table of the user's own by path.
pub fn layout(asked: &str) -> Result<Layout> {
    if let Some(layout) = Layout::named(asked) {
        return Ok(layout.clone());
    }
    let path = Path::new(asked);
    if !path.exists() {
        let names: Vec<&str> = Layout::built_in().iter().map(|l| l.name()).collect();
        bail!(
            "no layout {asked}: there are {}; or give a file with a table",
            names.join(", ")
        );
    }
    setup::layout_of_file(path)
}
