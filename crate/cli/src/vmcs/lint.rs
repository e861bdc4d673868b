//! The checks of VM entry, walked over a VMCS in a file.

use std::path::Path;

use anyhow::{Context, Result, bail};
use hypernest_cpu::{Model, VmxProfile};
use hypernest_vmcs::Caps;
use serde_json::{Value, json};

use super::input::open;
use super::{DIFFERENT, FileArgs, print, print_json};
use crate::files;

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

pub fn lint(args: &FileArgs, profile: &str) -> Result<i32> {
    let caps = capabilities(profile)?;
    let lint = open(&args.file)?.read(args.layout.as_deref())?.lint(&caps);
    if args.json {
        let failed: Vec<Value> = lint
            .failed
            .iter()
            .map(|(id, says)| json!({"id": id, "says": says}))
            .collect();
        print_json(&json!({
            "profile": profile,
            "checks": lint.checks,
            "failed": failed,
            "not_judged": lint.not_judged,
        }));
    } else {
        let mut text = String::new();
        for (_, says) in &lint.failed {
            text += &format!("{says}\n");
        }
        text += &format!(
            "{} checks against profile {profile}: {} fail, {} cannot be judged from a file\n",
            lint.checks,
            lint.failed.len(),
            lint.not_judged.len()
        );
        print(&text);
    }
    Ok(if lint.failed.is_empty() { 0 } else { DIFFERENT })
}
