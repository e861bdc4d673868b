//! `hypernest snapshot info`: what a snapshot holds. It reads all of it, and so says whether it is whole.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use hypernest_cpu::ActiveEnlightened;
use hypernest_machine::devices::virtio::BackendState;
use hypernest_machine::{Layout, MAX_MEMORY, MachineState, VcpuState, VmxChoice};
use hypernest_migrate::snapshot::{About, Contents, DiskPart};
use serde_json::{Value, json};

use crate::vmcs::{print, print_json};

pub fn run(path: &Path, as_json: bool) -> Result<i32> {
    let file = super::open(path)?;
    let opened = super::begin(path, file)?;
    let (about, disks) = (opened.about().clone(), opened.disks().to_vec());
    let contents = opened
        .contents(MAX_MEMORY)
        .with_context(|| format!("cannot read the snapshot {}", path.display()))?;
    if as_json {
        print_json(&json(&about, &disks, &contents));
    } else {
        print(&text(path, &about, &disks, &contents));
    }
    Ok(0)
}

fn text(path: &Path, about: &About, disks: &[DiskPart], contents: &Contents) -> String {
    let Contents {
        state,
        ram,
        pages,
        sections,
    } = contents;
    let config = &state.config;
    let mut text = format!(
        "snapshot {} of hypernest {}\n",
        path.display(),
        about.writer
    );
    // Writing to a string does not fail.
    let _ = writeln!(text, "booted    {}", about.boot);
    let _ = writeln!(
        text,
        "machine   {} MiB, {} of model {}, VMX {}{}",
        config.memory >> 20,
        vcpus(config.cpus),
        config.model,
        vmx(&config.vmx),
        if config.hyperv {
            ", Hyper-V interface"
        } else {
            ""
        },
    );
    if let Some(layouts) = layouts(state) {
        let _ = writeln!(text, "layouts   {layouts}");
    }
    let _ = writeln!(text, "tick      {}", state.clock.now);
    for (n, vcpu) in state.vcpu.iter().enumerate() {
        let _ = writeln!(text, "vCPU {n:<4} {}", place(vcpu));
    }
    for (n, disk) in disks.iter().enumerate() {
        let name = about.disks.get(n).map_or("", String::as_str);
        let read_only = if disk.read_only { ", read-only" } else { "" };
        let (size, written) = (disk.size, written(state, disk));
        let _ = writeln!(
            text,
            "disk {:<4} {name}, {size} bytes{read_only}, {written} pieces of 4 KiB written",
            n + 1,
        );
    }
    let _ = writeln!(
        text,
        "memory    {} pages of 4 KiB: {} zero, {} equal to others, {} stored in {} bytes",
        config.memory / 4096,
        config.memory / 4096 - pages.shared - pages.stored,
        pages.shared,
        pages.stored,
        sections.get("ram").map_or(0, |size| size.bytes),
    );
    let _ = writeln!(text, "hash      {:016x}", state.hash(ram.bytes()));
    text
}

fn vcpus(count: u32) -> String {
    match count {
        1 => "1 vCPU".into(),
        count => format!("{count} vCPUs"),
    }
}

fn vmx(choice: &VmxChoice) -> &'static str {
    match choice {
        VmxChoice::None => "none",
        VmxChoice::Kvm => "kvm",
        VmxChoice::Max => "max",
        VmxChoice::Msrs(_) => "of a file",
    }
}

/// Advertised, written and accepted layouts, where somebody chose any.
fn layouts(state: &MachineState) -> Option<String> {
    let layouts = &state.config.layouts;
    let name = |layout: &Option<Layout>| layout.as_ref().map(|layout| layout.name().to_owned());
    let accepted = layouts.accepted.iter().map(Layout::name);
    let accepted = accepted.collect::<Vec<_>>().join(", ");
    let parts = [
        ("advertised", name(&layouts.advertised)),
        ("written", name(&layouts.written)),
        ("accepted", Some(accepted).filter(|names| !names.is_empty())),
    ];
    let parts: Vec<String> = parts
        .into_iter()
        .filter_map(|(what, names)| Some(format!("{what} {}", names?)))
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Where a vCPU stands.
fn place(vcpu: &VcpuState) -> String {
    let level = if vcpu.vmx.non_root { "L2" } else { "L1" };
    let mut text = format!(
        "{level}, rip {:#x}, {}",
        vcpu.rip,
        format!("{:?}", vcpu.activity).to_lowercase()
    );
    if let Some(region) = vcpu.vmx.region {
        text += &format!(", VMXON region {region:#x}");
    }
    if let Some(current) = vcpu.vmx.current {
        text += &format!(", current VMCS {current:#x}");
    }
    match vcpu.vmx.enlightened {
        Some(ActiveEnlightened::At(address)) => {
            text += &format!(", enlightened VMCS {address:#x}");
        }
        Some(ActiveEnlightened::ByAssistPage) => text += ", enlightened VMCS of the assist page",
        None => {}
    }
    text
}

/// How many pieces of a disk the guest has written.
fn written(state: &MachineState, disk: &DiskPart) -> usize {
    match state.board.virtio.get(disk.slot as usize) {
        Some(device) => match &device.backend {
            BackendState::Block(block) => block.overlay.len(),
            BackendState::Console(_) => 0,
        },
        None => 0,
    }
}

fn json(about: &About, disks: &[DiskPart], contents: &Contents) -> Value {
    let Contents {
        state,
        ram,
        pages,
        sections,
    } = contents;
    let config = &state.config;
    let vcpus = state.vcpu.iter().map(|vcpu| {
        json!({
            "level": if vcpu.vmx.non_root { "L2" } else { "L1" },
            "rip": format!("{:#x}", vcpu.rip),
            "activity": format!("{:?}", vcpu.activity).to_lowercase(),
            "vmxon": vcpu.vmx.region.map(|at| format!("{at:#x}")),
            "vmcs": vcpu.vmx.current.map(|at| format!("{at:#x}")),
            "evmcs": match vcpu.vmx.enlightened {
                Some(ActiveEnlightened::At(address)) => Value::from(format!("{address:#x}")),
                Some(ActiveEnlightened::ByAssistPage) => "assist page".into(),
                None => Value::Null,
            },
        })
    });
    let names = about.disks.iter().map(String::as_str);
    let disks = disks.iter().zip(names.chain(std::iter::repeat("")));
    let disks = disks.map(|(disk, name)| {
        json!({
            "name": name,
            "bytes": disk.size,
            "read_only": disk.read_only,
            "pieces_written": written(state, disk),
        })
    });
    let sections = sections.iter().map(|(name, size)| {
        let size = json!({"count": size.count, "bytes": size.bytes});
        (name.clone(), size)
    });
    let layouts = &config.layouts;
    let name = |layout: &Option<Layout>| layout.as_ref().map(|layout| layout.name().to_owned());
    json!({
        "writer": about.writer,
        "boot": about.boot,
        "memory": config.memory,
        "cpus": config.cpus,
        "model": config.model,
        "vmx": vmx(&config.vmx),
        "hyperv": config.hyperv,
        "layouts": {
            "advertised": name(&layouts.advertised),
            "written": name(&layouts.written),
            "accepted": layouts.accepted.iter().map(Layout::name).collect::<Vec<_>>(),
        },
        "tick": state.clock.now,
        "vcpus": vcpus.collect::<Vec<_>>(),
        "disks": disks.collect::<Vec<_>>(),
        "pages": {
            "zero": config.memory / 4096 - pages.shared - pages.stored,
            "shared": pages.shared,
            "stored": pages.stored,
        },
        "sections": sections.collect::<serde_json::Map<_, _>>(),
        "hash": format!("{:016x}", state.hash(ram.bytes())),
    })
}
