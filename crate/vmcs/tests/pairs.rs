//! Translation between each two layouts, judged field by field by the tables themselves: offsets, widths and
//! quirks are read and applied here without the library.

mod random;
mod tables;

use std::collections::BTreeMap;

use hypernest_vmcs::{Fate, Field, Layout, Losses, TranslateError, Translation};
use random::Random;
use tables::{Row, number};

/// Random VMCSs of each layout, each of which is translated to every layout.
const VMCSS: usize = 10_000;
/// Of them, one in this many has its report looked at, which says more and takes longer.
const REPORTED: usize = 50;

/// A place: offset, bytes, and whether the value is rotated left by 8 bits.
type Place = (usize, usize, bool);

/// A layout as its table has it.
struct Judge {
    name: &'static str,
    /// None: any revision is taken.
    revision: Option<u32>,
    /// Offset and bytes of the launch state, what is clear, what is launched.
    launch: Option<(usize, usize, u64, u64)>,
    /// By encoding.
    places: BTreeMap<u32, Place>,
    /// Fields whose bytes are another's.
    aliases: Vec<u32>,
}

fn is_field(row: &Row) -> bool {
    row["kind"] == "field"
}

fn judge(
    name: &'static str,
    revision: Option<u32>,
    rows: &[Row],
    (offset, width): (&str, &str),
) -> Judge {
    let places = rows.iter().map(|row| {
        let place = (number(&row[offset]) as usize, number(&row[width]) as usize);
        (number(&row["encoding"]), (place.0, place.1, false))
    });
    Judge {
        name,
        revision,
        launch: Some((8, 4, 0, 1)),
        places: places.collect(),
        aliases: vec![],
    }
}

fn fields(rows: Vec<Row>) -> Vec<Row> {
    rows.into_iter().filter(is_field).collect()
}

fn judges() -> Vec<Judge> {
    let plain = ("offset", "width_bytes");
    let kvm = |name, column: &str, version: &str, rows: Vec<Row>| {
        let rows: Vec<Row> = fields(rows)
            .into_iter()
            .filter(|row| row[column] == version)
            .collect();
        judge(name, Some(0x11E5_7ED0), &rows, plain)
    };
    let history = || table!("layout_kvm_history");
    let mut all = vec![
        // Rows of newer kernels are in the table too.
        kvm(
            "kvm",
            "kernel",
            "6.1 and 6.12",
            table!("layout_kvm_11e57ed0"),
        ),
        kvm("kvm-4.14", "variant", "b_v4.14", history()),
        kvm("kvm-4.0", "variant", "c_v4.0_derived", history()),
        kvm("kvm-3.10", "variant", "a_v3.10", history()),
    ];

    let mut virtualbox = judge(
        "virtualbox",
        Some(0x4000_0001),
        &fields(table!("layout_virtualbox")),
        plain,
    );
    virtualbox.launch = Some((8, 1, 1, 8));
    all.push(virtualbox);

    let mut bochs = judge("bochs", Some(0x2B), &fields(table!("layout_bochs")), plain);
    for (encoding, place) in &mut bochs.places {
        // The access rights of the guest's eight segments.
        place.2 = (0x4814..=0x4822).contains(encoding);
    }
    all.push(bochs);

    let mut acrn = judge(
        "acrn",
        Some(0x1540_7E12),
        &fields(table!("layout_acrn")),
        ("effective_offset", "width_bytes"),
    );
    // The VMX-preemption timer.
    acrn.aliases.push(0x482E);
    all.push(acrn);

    let mut xen = judge(
        "xen",
        None,
        &fields(table!("layout_xen_vvmcs")),
        ("offset", "slot_bytes"),
    );
    xen.launch = None;
    // Indexes of 32 and more come round to the slot of another field.
    xen.aliases = xen
        .places
        .keys()
        .copied()
        .filter(|encoding| encoding >> 1 & 0x1FF >= 32)
        .collect();
    all.push(xen);

    let mut xmhf = judge("xmhf", None, &fields(table!("layout_xmhf_amd64")), plain);
    xmhf.launch = None;
    all.push(xmhf);

    let evmcs = fields(table!("layout_evmcs_v1"));
    let mut enlightened = judge("evmcs-v1", Some(1), &evmcs, plain);
    enlightened.launch = None;
    all.push(enlightened);

    // Ours have no table: 8, 4, then 2 bytes, by encoding, behind what stands before.
    let mut ours = judge("hypernest", Some(u32::from_le_bytes(*b"HYPN")), &[], plain);
    pack(&mut ours.places, 12);
    all.push(ours);
    let mut ours = judge(
        "hypernest-evmcs",
        Some(u32::from_le_bytes(*b"HYEV")),
        &evmcs,
        plain,
    );
    ours.launch = Some((1024, 4, 0, 1));
    pack(&mut ours.places, 1028);
    all.push(ours);

    for judge in &mut all {
        for alias in &judge.aliases {
            let lost = judge.places.remove(alias).unwrap();
            assert!(judge.places.values().any(|place| place.0 == lost.0));
        }
    }
    all
}

fn pack(places: &mut BTreeMap<u32, Place>, mut offset: usize) {
    let encodings: Vec<u32> = table!("fields")
        .iter()
        .map(|row| number(&row["encoding"]))
        .collect();
    for bytes in [8, 4, 2] {
        offset = offset.next_multiple_of(bytes);
        for &encoding in &encodings {
            if width(encoding) == bytes && !places.contains_key(&encoding) {
                places.insert(encoding, (offset, bytes, false));
                offset += bytes;
            }
        }
    }
}

/// Bytes of a field's value. Vol. 3D, "Field Encoding in VMCS": bits 14:13.
fn width(encoding: u32) -> usize {
    [2, 8, 4, 8][encoding as usize >> 13 & 3]
}

fn mask(bytes: usize) -> u64 {
    u64::MAX >> (64 - 8 * bytes)
}

fn put(region: &mut [u8], (offset, bytes, rotated): Place, value: u64) {
    let value = if rotated {
        u64::from((value as u32).rotate_left(8))
    } else {
        value
    };
    region[offset..offset + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
}

/// What a region holds: a value for each place of its layout, in their order, and the header.
struct Truth {
    values: Vec<u64>,
    launched: bool,
    shadow: bool,
    abort: u32,
}

/// A random VMCS, of which more or less is not 0, as a region with noise wherever no value is.
fn random(random: &mut Random, judge: &Judge, region: &mut [u8]) -> Truth {
    for chunk in region.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes()[..chunk.len()]);
    }
    let dense = random.below(9);
    let mut values = Vec::with_capacity(judge.places.len());
    for (&encoding, &place) in &judge.places {
        let value = if random.below(8) < dense {
            random.next() & mask(width(encoding))
        } else {
            0
        };
        // A slot may be wider than its field; nothing says that the rest is 0.
        let noise = match random.next() & !mask(width(encoding)) {
            noise if place.1 > width(encoding) => noise,
            _ => 0,
        };
        put(region, place, value | noise);
        values.push(value);
    }
    let truth = Truth {
        values,
        launched: judge.launch.is_some() && random.below(2) != 0,
        shadow: random.below(2) != 0,
        abort: random.next() as u32,
    };
    let revision = judge.revision.unwrap_or(random.next() as u32 >> 1);
    header(judge, region, &truth, revision);
    truth
}

fn header(judge: &Judge, region: &mut [u8], truth: &Truth, revision: u32) {
    let shadow = u32::from(truth.shadow) << 31;
    put(region, (0, 4, false), (revision | shadow).into());
    put(region, (4, 4, false), truth.abort.into());
    if let Some((offset, bytes, clear, launched)) = judge.launch {
        let state = if truth.launched { launched } else { clear };
        put(region, (offset, bytes, false), state);
    }
}

/// A layout to translate to.
struct To<'a> {
    judge: &'a Judge,
    map: Translation,
    /// Its places, and for each which of the values comes there.
    comes: Vec<(Place, Option<usize>)>,
    /// Which of the values have no place, and their fields.
    lost: Vec<(usize, u32)>,
}

impl<'a> To<'a> {
    fn new(from: &Judge, judge: &'a Judge) -> Self {
        let layout = |judge: &Judge| Layout::named(judge.name).unwrap();
        let encodings: Vec<u32> = from.places.keys().copied().collect();
        let comes = judge.places.iter().map(|(encoding, &place)| {
            let from = encodings.iter().position(|other| other == encoding);
            (place, from)
        });
        let lost = encodings
            .iter()
            .copied()
            .enumerate()
            .filter(|(_, encoding)| !judge.places.contains_key(encoding));
        Self {
            judge,
            map: Translation::new(layout(from), layout(judge)),
            comes: comes.collect(),
            lost: lost.collect(),
        }
    }

    /// What the translation must write over `region`.
    fn expect(&self, truth: &Truth, region: &mut [u8]) {
        header(self.judge, region, truth, self.judge.revision.unwrap_or(0));
        for &(place, from) in &self.comes {
            put(region, place, from.map_or(0, |at| truth.values[at]));
        }
    }

    /// What it must say is lost.
    fn losses(&self, truth: &Truth) -> Vec<(u32, u64)> {
        let values = self.lost.iter();
        let values = values.map(|&(at, encoding)| (encoding, truth.values[at]));
        values.filter(|&(_, value)| value != 0).collect()
    }
}

fn fate(from: &Judge, to: &Judge, encoding: u32, value: u64) -> Option<Fate> {
    Some(
        match (from.places.get(&encoding), to.places.get(&encoding)) {
            (None, None) => return None,
            (None, Some(_)) => Fate::Defaulted,
            (Some(_), None) if value == 0 => Fate::Dropped,
            (Some(_), None) => Fate::Lost(value),
            (Some(old), Some(new)) if (old.1, old.2) == (new.1, new.2) => Fate::Copied,
            (Some(old), Some(new)) if new.1 > old.1 => Fate::Widened,
            _ => Fate::Converted,
        },
    )
}

#[test]
fn each_ordered_pair_translates_as_its_tables_say_and_reports_each_loss() {
    let judges = judges();
    assert_eq!(judges.len(), Layout::built_in().len());
    std::thread::scope(|scope| {
        for (seed, from) in (1..).zip(&judges) {
            let judges = &judges;
            scope.spawn(move || translate_all(seed, from, judges));
        }
    });
}

/// Random VMCSs of `from`, to each of `judges`.
fn translate_all(seed: u64, from: &Judge, judges: &[Judge]) {
    let encodings: Vec<u32> = Field::ALL.iter().map(|field| field.encoding()).collect();
    let all: Vec<To> = judges.iter().map(|to| To::new(from, to)).collect();
    let mut next = Random(seed);
    let (mut source, mut result, mut truth) = ([0u8; 4096], [0u8; 4096], [0u8; 4096]);
    for number in 0..VMCSS {
        let values = random(&mut next, from, &mut source);
        for to in &all {
            let map = &to.map;
            let pair = || format!("{} to {}", from.name, to.judge.name);
            let lost = to.losses(&values);
            let said = map
                .losses(&source)
                .map(|(field, value)| (field.encoding(), value));
            assert!(said.eq(lost.iter().copied()), "{}", pair());

            truth.fill(number as u8);
            result.fill(number as u8);
            let refused = match lost.first() {
                Some(&(encoding, value)) => Some(TranslateError::Lost {
                    first: Field::from_encoding(encoding).unwrap().0,
                    value,
                    fields: lost.len(),
                }),
                None if values.launched && to.judge.launch.is_none() => {
                    Some(TranslateError::LaunchState)
                }
                None => None,
            };
            let strict = map.run(&source, &mut result, Losses::Refused);
            assert_eq!(strict.err(), refused, "{}", pair());
            if refused.is_some() {
                assert!(result == truth, "{}", pair());
                map.run(&source, &mut result, Losses::Allowed).unwrap();
            }
            to.expect(&values, &mut truth);
            assert!(result == truth, "{}", pair());

            if number % REPORTED == 0 {
                let value: BTreeMap<u32, u64> = from
                    .places
                    .keys()
                    .copied()
                    .zip(values.values.iter().copied())
                    .collect();
                let expected: Vec<(u32, Fate)> = encodings
                    .iter()
                    .filter_map(|&encoding| {
                        let value = value.get(&encoding).copied().unwrap_or(0);
                        Some((encoding, fate(from, to.judge, encoding, value)?))
                    })
                    .collect();
                let report = map.report(&source).unwrap();
                let said = report.iter().map(|(field, fate)| (field.encoding(), *fate));
                assert!(said.eq(expected), "{}", pair());
            }
        }
    }
}
