//! The checks of VM entry, walked over a VMCS in a file.

use std::cell::Cell;
use std::path::Path;

use anyhow::{Context, Result, bail};
use hypernest_cpu::{Model, VmxProfile};
use hypernest_vmcs::checks::{self, CpuFacts, EntryCtx, PeekMemory, Verdict};
use hypernest_vmcs::{Caps, Field, exit};
use serde_json::{Value, json};

use super::input::{Found, open};
use super::{DIFFERENT, FileArgs, print, print_json};
use crate::files;

/// The memory of the machine that the file is from, which nobody has: rules that look into it cannot
/// be judged.
#[derive(Default)]
struct Elsewhere(Cell<bool>);

impl PeekMemory for Elsewhere {
    fn read_u32(&self, _gpa: u64) -> Option<u32> {
        self.0.set(true);
        None
    }
    fn read_u64(&self, _gpa: u64) -> Option<u64> {
        self.0.set(true);
        None
    }
    fn accepts_revision(&self, _revision: u32) -> bool {
        true
    }
}

fn capabilities(profile: &str) -> Result<Caps> {
    let model = <&Model>::default();
    match profile {
        "max" => Ok(VmxProfile::max(model).caps),
        "kvm" => Ok(VmxProfile::kvm(model).caps),
        path if Path::new(path).exists() => {
            let bytes = files::read("profile", Path::new(path))?;
            let text = std::str::from_utf8(&bytes).with_context(|| format!("profile {path}"))?;
            Caps::from_dump(text).with_context(|| format!("profile {path}"))
        }
        other => bail!("no profile {other}: there are kvm and max; or give a file with MSRs"),
    }
}

/// A processor that lets pass what the file does not tell.
fn processor(read: &Found) -> CpuFacts {
    let vmcs = &read.vmcs;
    let five_levels = vmcs.get(Field::HOST_CR4) >> 12 & 1 != 0;
    CpuFacts {
        physical_bits: 46,
        linear_bits: if five_levels { 57 } else { 48 },
        efer: 0xD01,
        debugctl: 0xFFC3,
        perf_global_ctrl: u64::MAX,
        rtit_ctl: u64::MAX,
        lbr_ctl: u64::MAX,
        spec_ctrl: u64::MAX,
        lam: true,
        sgx: true,
        rtm: true,
        bus_lock_debug: true,
        fred: true,
        long_mode: vmcs.get(Field::VM_EXIT_CONTROLS) & u64::from(exit::HOST_ADDRESS_SPACE_SIZE)
            != 0,
        smm: false,
        seam: false,
        tracing: false,
        current_vmcs: u64::MAX,
        vmxon: u64::MAX - 1,
    }
}

pub fn lint(args: &FileArgs, profile: &str) -> Result<i32> {
    let caps = capabilities(profile)?;
    let input = open(&args.file)?;
    let read = input.read(args.layout.as_deref())?;
    let memory = Elsewhere::default();
    let entry = EntryCtx {
        vmcs: &read.vmcs,
        caps: &caps,
        cpu: processor(&read),
        memory: &memory,
    };
    let (mut failed, mut unknown) = (Vec::new(), Vec::new());
    let mut walked = 0;
    for check in checks::all() {
        walked += 1;
        memory.0.set(false);
        let verdict = check.verdict(&entry);
        // A log does not have every field.
        let missing = check
            .fields
            .iter()
            .any(|&field| !read.fields.contains(field));
        if memory.0.get() || read.layout.is_none() && missing && verdict == Verdict::Fails {
            unknown.push(check);
        } else if verdict == Verdict::Fails {
            failed.push(check);
        }
    }
    if args.json {
        let failed: Vec<Value> = failed
            .iter()
            .map(|check| json!({"id": check.id, "says": checks::explain(check, &entry)}))
            .collect();
        let unknown: Vec<&str> = unknown.iter().map(|check| check.id).collect();
        print_json(&json!({
            "profile": profile,
            "checks": walked,
            "failed": failed,
            "not_judged": unknown,
        }));
    } else {
        let mut text = String::new();
        for check in &failed {
            text += &format!("{}\n", checks::explain(check, &entry));
        }
        text += &format!(
            "{walked} checks against profile {profile}: {} fail, {} cannot be judged from a file\n",
            failed.len(),
            unknown.len()
        );
        print(&text);
    }
    Ok(if failed.is_empty() { 0 } else { DIFFERENT })
}
