//! A VMCS in a file, for the page: what `hypernest vmcs` does, on bytes, with its JSON as objects.
//!
//! A layout is named, or is the text of a table. Values are strings in hexadecimal: numbers of JavaScript have 53 bits.

use std::collections::BTreeMap;

use hypernest_machine::cpu::{Model, VmxProfile};
use hypernest_vmcs::migration::{InStream, nested_states};
use hypernest_vmcs::{
    Caps, Fate, Field, File, Found, Layout, Losses, TranslateError, Translation, revision,
};
use serde::{Serialize, Serializer};

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

fn bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// A layout that is built in.
#[derive(Serialize, Debug)]
pub struct LayoutInfo {
    /// What it is called.
    pub name: &'static str,
    /// What it is, in a line.
    pub title: &'static str,
    /// None: any.
    pub revisions: Vec<u32>,
    /// Fields that it has a slot for.
    pub fields: usize,
    /// Bytes up to the last slot.
    pub bytes: usize,
    /// A processor can keep VMCSs in it.
    pub machine: bool,
}

/// Every layout that is built in.
pub fn layouts() -> Vec<LayoutInfo> {
    Layout::built_in()
        .iter()
        .map(|layout| LayoutInfo {
            name: layout.name(),
            title: layout.title(),
            revisions: layout.revisions().to_vec(),
            fields: layout.slots().len(),
            bytes: layout.used(),
            machine: layout.is_for_machines(),
        })
        .collect()
}

/// A layout as a table that can be changed and given as a layout.
pub fn layout_table(name: &str) -> Result<String, String> {
    Ok(layout(name)?.to_table())
}

fn layout(asked: &str) -> Result<Layout, String> {
    if asked.contains('\n') {
        return Layout::from_table(asked).map_err(|error| error.to_string());
    }
    Layout::named(asked).cloned().ok_or_else(|| {
        let names: Vec<&str> = Layout::built_in().iter().map(|l| l.name()).collect();
        format!("no layout {asked}: there are {}", names.join(", "))
    })
}

fn file(bytes: &[u8]) -> Result<File, String> {
    File::read(bytes.to_vec()).map_err(|error| error.to_string())
}

fn found(bytes: &[u8], asked: Option<&str>) -> Result<Found, String> {
    let asked = asked.map(layout).transpose()?;
    let found = file(bytes)?.vmcs(asked.as_ref());
    found.map_err(|error| error.to_string())
}

/// What a file is, and the layouts that its region may have, best first.
#[derive(Serialize, Debug)]
pub struct Identified {
    /// `region`, `nested state` or `log`.
    pub kind: &'static str,
    /// Of its region.
    pub revision: Option<String>,
    /// It is a shadow VMCS.
    pub shadow: bool,
    /// The layouts that it may have.
    pub candidates: Vec<CandidateInfo>,
    /// What is odd about a nested state.
    pub notes: Vec<&'static str>,
}

/// A layout that a region may have, and the evidence.
#[derive(Serialize, Debug)]
pub struct CandidateInfo {
    /// What it is called.
    pub layout: &'static str,
    /// How well the values fit; higher is better.
    pub score: i32,
    /// The revision is the layout's own.
    pub by_revision: bool,
    /// Rules that values obey.
    pub holds: u32,
    /// Bytes other than 0 that belong to no slot.
    pub stray_bytes: usize,
    /// Values that break a rule.
    pub broken: Vec<Broken>,
}

/// A value that speaks against a layout.
#[derive(Serialize, Debug)]
pub struct Broken {
    /// The field, as the layout places it.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// The rule.
    pub rule: &'static str,
}

/// Says what a file is.
pub fn identify(bytes: &[u8]) -> Result<Identified, String> {
    let file = file(bytes)?;
    let found = file.candidates();
    let header = file.region().and_then(revision);
    let best = found.first().map(|best| best.layout);
    let notes = match (&file, best) {
        (File::NestedState(state), Some(best)) => state
            .findings(best)
            .iter()
            .map(|finding| finding.words())
            .collect(),
        _ => Vec::new(),
    };
    let candidates = found.iter().map(|candidate| CandidateInfo {
        layout: candidate.layout.name(),
        score: candidate.score,
        by_revision: candidate.by_revision,
        holds: candidate.holds,
        stray_bytes: candidate.stray,
        broken: candidate
            .broken
            .iter()
            .map(|evidence| Broken {
                field: evidence.field.short_name(),
                value: hex(evidence.value),
                rule: evidence.rule,
            })
            .collect(),
    });
    Ok(Identified {
        kind: file.kind(),
        revision: header.map(|(id, _)| format!("{id:#010x}")),
        shadow: header.is_some_and(|(_, shadow)| shadow),
        candidates: candidates.collect(),
        notes,
    })
}

/// A VMCS by field.
#[derive(Serialize, Debug)]
pub struct Shown {
    /// None: a log.
    pub layout: Option<String>,
    /// Its launch state.
    pub launched: bool,
    /// It is a shadow VMCS.
    pub shadow: bool,
    /// The VMX-abort indicator.
    pub abort: u32,
    /// Fields whose bytes are another's.
    pub aliases: BTreeMap<&'static str, &'static str>,
    /// Every field that the file has.
    pub fields: BTreeMap<&'static str, String>,
}

/// The fields of a file.
pub fn show(bytes: &[u8], asked: Option<&str>) -> Result<Shown, String> {
    let found = found(bytes, asked)?;
    let name = |field: Field| field.short_name();
    let aliases = found.layout.iter().flat_map(|layout| layout.yields());
    Ok(Shown {
        aliases: aliases
            .map(|(loser, winner)| (name(*loser), name(*winner)))
            .collect(),
        fields: found
            .fields
            .iter()
            .map(|field| (name(field), hex(found.vmcs.get(field))))
            .collect(),
        layout: found.layout.map(|layout| layout.name().to_owned()),
        launched: found.vmcs.launched,
        shadow: found.vmcs.shadow,
        abort: found.vmcs.abort,
    })
}

/// What the checks of VM entry say.
#[derive(Serialize, Debug)]
pub struct Linted {
    /// How many were walked.
    pub checks: usize,
    /// Those that fail.
    pub failed: Vec<Failed>,
    /// Checks that need what is not in the file.
    pub not_judged: Vec<&'static str>,
}

/// A check that fails.
#[derive(Serialize, Debug)]
pub struct Failed {
    /// Its row of the table of checks.
    pub id: &'static str,
    /// The condition, and the values that it read.
    pub says: String,
}

/// Walks the checks of VM entry. The profile is `kvm`, `max` or the text of a dump of the IA32_VMX_* registers.
pub fn lint(bytes: &[u8], profile: &str, asked: Option<&str>) -> Result<Linted, String> {
    let model = <&Model>::default();
    let caps = match profile {
        "kvm" => VmxProfile::kvm(model).caps,
        "max" => VmxProfile::max(model).caps,
        text if text.contains('\n') => Caps::from_dump(text).map_err(|error| error.to_string())?,
        other => return Err(format!("no profile {other}: there are kvm and max")),
    };
    let lint = found(bytes, asked)?.lint(&caps);
    let failed = lint
        .failed
        .into_iter()
        .map(|(id, says)| Failed { id, says });
    Ok(Linted {
        checks: lint.checks,
        failed: failed.collect(),
        not_judged: lint.not_judged,
    })
}

/// A file in another layout.
#[derive(Serialize, Debug)]
pub struct Translated {
    /// The layout that was read.
    pub from: String,
    /// The layout that was written.
    pub to: String,
    /// The bytes of the file.
    #[serde(serialize_with = "bytes")]
    pub bytes: Vec<u8>,
    /// What becomes of each field: `copied`, `widened`, `converted`, `defaulted`, `dropped` or `lost`.
    pub fields: BTreeMap<&'static str, &'static str>,
    /// The values that are lost.
    pub lost: BTreeMap<&'static str, String>,
}

/// Translates a file. Unless losses are allowed, a value other than 0 without a place is an error.
pub fn translate(
    bytes: &[u8],
    from: Option<&str>,
    to: &str,
    allow_loss: bool,
) -> Result<Translated, String> {
    let file = file(bytes)?;
    let to = layout(to)?;
    let from = match (from, file.region()) {
        (Some(from), Some(_)) => layout(from)?,
        // A log has no layout, and ours has every field.
        (_, None) => Layout::hypernest().clone(),
        (None, Some(_)) => {
            let likely = file.layout().map_err(|error| error.to_string())?;
            likely.ok_or("no layout")?.clone()
        }
    };
    let map = Translation::new(&from, &to);
    let losses = if allow_loss {
        Losses::Allowed
    } else {
        Losses::Refused
    };
    let done = file.translate(&map, losses).map_err(|error| match error {
        TranslateError::Lost { .. } => {
            let list: Vec<String> = file
                .losses(&map)
                .iter()
                .map(|(field, value)| format!("{} {value:#x}", field.short_name()))
                .collect();
            format!("{} has no place for {}", to.name(), list.join(", "))
        }
        error => error.to_string(),
    })?;
    let word = |fate| match fate {
        Fate::Copied => "copied",
        Fate::Widened => "widened",
        Fate::Converted => "converted",
        Fate::Defaulted => "defaulted",
        Fate::Dropped => "dropped",
        Fate::Lost(_) => "lost",
    };
    let lost = done.report.iter().filter_map(|(field, fate)| match fate {
        Fate::Lost(value) => Some((field.short_name(), hex(*value))),
        _ => None,
    });
    Ok(Translated {
        from: from.name().to_owned(),
        to: to.name().to_owned(),
        fields: done
            .report
            .iter()
            .map(|(field, fate)| (field.short_name(), word(*fate)))
            .collect(),
        lost: lost.collect(),
        bytes: done.bytes,
    })
}

/// In what two files differ.
#[derive(Serialize, Debug)]
pub struct Differences {
    /// The values of both; none where a file has no such field.
    pub fields: BTreeMap<&'static str, [Option<String>; 2]>,
    /// Whether each was launched, where they differ.
    pub launched: Option<[bool; 2]>,
}

/// Compares two files by field.
pub fn diff(
    a: &[u8],
    b: &[u8],
    layout_a: Option<&str>,
    layout_b: Option<&str>,
) -> Result<Differences, String> {
    let a = found(a, layout_a).map_err(|error| format!("the first: {error}"))?;
    let b = found(b, layout_b).map_err(|error| format!("the second: {error}"))?;
    let fields = a.differences(&b).into_iter();
    let fields = fields.map(|(field, a, b)| (field.short_name(), [a.map(hex), b.map(hex)]));
    let both = a.layout.is_some() && b.layout.is_some();
    let launched = [a.vmcs.launched, b.vmcs.launched];
    Ok(Differences {
        fields: fields.collect(),
        launched: (both && launched[0] != launched[1]).then_some(launched),
    })
}

/// A nested state in a migration stream.
#[derive(Serialize, Debug)]
pub struct Extracted {
    /// None: outside of a processor's section.
    pub cpu: Option<u32>,
    /// Bytes from the start of the stream.
    pub offset: usize,
    /// Address of the VMXON region.
    pub vmxon: String,
    /// Address of the current VMCS.
    pub vmcs: String,
    /// Its state flags.
    pub flags: u16,
    /// The bytes of the file.
    #[serde(serialize_with = "bytes")]
    pub bytes: Vec<u8>,
}

/// Finds the nested states in a migration stream.
pub fn extract(bytes: &[u8]) -> Result<Vec<Extracted>, String> {
    let extracted = |found: InStream| Extracted {
        cpu: found.cpu,
        offset: found.offset,
        vmxon: hex(found.state.vmxon),
        vmcs: hex(found.state.vmcs),
        flags: found.state.flags,
        bytes: found.state.to_bytes(),
    };
    nested_states(bytes)
        .map(|found| found.map(extracted).map_err(|error| error.to_string()))
        .collect()
}
