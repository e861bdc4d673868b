//! A running machine moves over a link, in one process: both sides of the protocol, and the rounds that it took.
//!
//! Link and time are simulated, so that it is the same every time: 200 MB a second, a machine of 200 million ticks a second.
//!
//! ```text
//! cargo run --release --example move_machine                             the built-in hypervisor
//! cargo run --release --example move_machine SNAPSHOT                    the machine in a file
//! cargo run --release --example move_machine SNAPSHOT > picture.svg     the same as a picture
//! ```

use std::error::Error;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufReader, IsTerminal};

use hypernest_machine::{Machine, Until, VmxChoice, VmxLayouts};
use hypernest_migrate::Snapshot;
use hypernest_migrate::hello::Offer;
use hypernest_migrate::live::{
    Destination, DestinationNext, Identity, Progress, Round, Settings, Source, SourceNext,
};

/// Microseconds of a step of the simulation.
const STEP: u64 = 500;
/// Bytes that the link takes in one.
const BYTES: usize = 100_000;
/// Ticks that the machine runs in one.
const TICKS: u64 = 100_000;

fn main() -> Result<(), Box<dyn Error>> {
    let mut machine = match std::env::args().nth(1) {
        Some(path) => {
            let file = BufReader::new(File::open(path)?);
            Snapshot::open(file)?.build(u64::MAX, Vec::new(), |builder| builder)?
        }
        None => built_in()?,
    };
    let at = machine.now();
    let (mut moved, progress) = move_over(&mut machine)?;
    let table = table(&progress);
    eprint!(
        "moved from tick {at} on, runs on from tick {}\n{table}",
        moved.now()
    );
    let next = moved.now() + 1000;
    moved.run(&Until::tick(next))?;
    if !std::io::stdout().is_terminal() {
        print!("{}", picture(&progress));
    }
    Ok(())
}

fn built_in() -> Result<Machine, Box<dyn Error>> {
    let mut machine = Machine::builder()
        .memory(hypernest_guests::HYPERVISOR_MEMORY)
        .vmx(VmxChoice::Max)
        .image(hypernest_guests::HYPERVISOR)
        .build()?;
    machine.run(&Until::tick(20_000))?;
    Ok(machine)
}

/// Both sides take their turns until the machine is the destination's.
fn move_over(machine: &mut Machine) -> Result<(Machine, Progress), Box<dyn Error>> {
    let offer = Offer::of(machine)?;
    let config = offer.config(&VmxLayouts::default())?;
    // A program takes both numbers from its source of randomness, and sends the offer itself.
    let identity = Identity { id: 1, release: 2 };
    let mut now = 0;
    let mut source = Source::new(machine, Settings::default(), identity, Vec::new(), now)?;
    let mut destination = Destination::new(Settings::default(), 3);
    let mut on_the_way = Vec::new();
    loop {
        match source.poll(machine, now) {
            SourceNext::Run => {
                let end = machine.now() + TICKS;
                machine.run(&Until::tick(end))?;
            }
            SourceNext::HandedOver => break,
            SourceNext::GoOn(why) => return Err(why.into()),
            _ => {}
        }
        let out = source.output();
        let most = BYTES.saturating_sub(on_the_way.len()).min(out.len());
        on_the_way.extend_from_slice(&out[..most]);
        source.sent(most);
        destination.receive(&std::mem::take(&mut on_the_way));
        match destination.poll(now) {
            DestinationNext::Judge => {
                let empty = Machine::builder()
                    .memory(config.memory)
                    .cpus(config.cpus)
                    .model(&config.model)
                    .vmx(config.vmx.clone())
                    .hyperv(config.hyperv)
                    .vmcs_layouts(config.layouts.clone())
                    .build()?;
                destination.accept(empty);
            }
            DestinationNext::Own => destination.confirm(),
            DestinationNext::Failed(why) => return Err(why.into()),
            _ => {}
        }
        let answer = destination.output().to_vec();
        destination.sent(answer.len());
        source.receive(&answer);
        now += STEP;
    }
    let moved = destination
        .take_machine()
        .ok_or("the destination has no machine")?;
    Ok((moved, source.progress().clone()))
}

fn table(progress: &Progress) -> String {
    let mut text = String::from("round   pages  with content     bytes        ms\n");
    for (n, round) in progress.rounds.iter().enumerate() {
        let Round {
            pages,
            contents,
            bytes,
            micros,
        } = round;
        let ms = *micros as f64 / 1000.0;
        let _ = writeln!(
            text,
            "{:5} {pages:7} {contents:13} {bytes:9} {ms:9.1}",
            n + 1
        );
    }
    let (all, stopped) = (
        progress.micros as f64 / 1000.0,
        progress.downtime as f64 / 1000.0,
    );
    let _ = writeln!(
        text,
        "in all {all:.1} ms; no machine ran for {stopped:.1} ms"
    );
    text
}

/// Time goes to the right. A bar is a round: as wide as it took, as high as its pages are many, on a logarithmic scale.
fn picture(progress: &Progress) -> String {
    const LEFT: f64 = 90.0;
    const WIDTH: f64 = 740.0;
    const FLOOR: f64 = 220.0;
    let all = (progress.micros as f64).max(1.0);
    let x = |micros: f64| LEFT + micros / all * WIDTH;
    let height = |pages: u64| ((pages.max(1) as f64).log10() + 0.2) * 34.0;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 860 330\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"860\" height=\"330\" fill=\"#ffffff\"/>\n",
    );
    let mut put = |line: String| {
        svg.push_str(&line);
        svg.push('\n');
    };
    for power in 0..=5 {
        let y = FLOOR - height(10u64.pow(power));
        put(format!(
            "<path d=\"M{LEFT} {y:.1}h{WIDTH}\" stroke=\"#dddddd\"/><text x=\"82\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#555555\">{}</text>",
            y + 4.0,
            10u64.pow(power)
        ));
    }
    put("<text x=\"12\" y=\"20\" fill=\"#555555\">pages</text>".into());
    let last = progress.rounds.len().saturating_sub(1);
    let mut begin = 0.0;
    for (n, round) in progress.rounds.iter().enumerate() {
        let width = (round.micros as f64 / all * WIDTH).max(1.5);
        let (high, of_content) = (height(round.pages), height(round.contents));
        let colour = if n == last { "#c0392b" } else { "#2e6da4" };
        put(format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{high:.1}\" fill=\"{colour}\" opacity=\"0.35\"/>\
             <rect x=\"{:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{of_content:.1}\" fill=\"{colour}\"/>",
            x(begin),
            FLOOR - high,
            x(begin),
            FLOOR - of_content
        ));
        begin += round.micros as f64;
    }
    let stopped = x((progress.micros - progress.downtime.min(progress.micros)) as f64);
    let end = LEFT + WIDTH;
    for (y, name, from, to, colour) in [
        (246.0, "source", LEFT, stopped, "#2e6da4"),
        (274.0, "destination", end, end + 22.0, "#2e8b57"),
    ] {
        put(format!(
            "<text x=\"82\" y=\"{:.1}\" text-anchor=\"end\" fill=\"#333333\">{name}</text>\
             <rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"12\" fill=\"{colour}\"/>",
            y + 10.0,
            to - from
        ));
    }
    put(format!(
        "<rect x=\"{stopped:.1}\" y=\"240\" width=\"{:.1}\" height=\"52\" fill=\"#c0392b\" opacity=\"0.15\"/>",
        end - stopped
    ));
    put(format!(
        "<text x=\"{LEFT}\" y=\"315\" fill=\"#333333\">{} rounds, {:.1} MB in {:.0} ms; blue: the machine runs meanwhile; red: it stands still, {:.1} ms; \
         dark: pages sent with their content</text>",
        progress.rounds.len(),
        progress.bytes as f64 / 1e6,
        all / 1000.0,
        progress.downtime as f64 / 1000.0
    ));
    svg.push_str("</svg>\n");
    svg
}
