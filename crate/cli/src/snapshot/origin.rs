//! `hypernest resume`: a machine from a snapshot, as often as asked.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hypernest_machine::{Config, DiskImage, Layout, Machine, Model, VmxLayouts};
use hypernest_migrate::snapshot::{About, SnapshotError};

use crate::args::ResumeArgs;
use crate::setup::{Disk, find_layout, own_layouts};

/// A snapshot and what its machine needs besides.
pub struct Origin {
    /// Kept open, so that it stays what it was even where a new snapshot takes its name.
    file: File,
    /// Where in it the snapshot begins.
    start: u64,
    path: PathBuf,
    about: About,
    disks: Vec<PathBuf>,
    memory: u64,
    /// Where they are to be others than before.
    layouts: Option<VmxLayouts>,
    block_length: Option<u32>,
}

impl Origin {
    /// Reads what precedes the memory, and the layouts that `args` name.
    ///
    /// # Errors
    /// The file is no snapshot, or the layouts are none it can have.
    pub fn open(args: &ResumeArgs) -> Result<Origin> {
        let mut file = super::open(&args.snapshot)?;
        let start = crate::migrate::of_record(&mut file, &args.snapshot)?;
        let opened = super::begin(&args.snapshot, &file)?;
        let own = own_layouts(&args.regions.layouts)?;
        let layouts = layouts(args, &own, &opened.state().config)?;
        Ok(Origin {
            about: opened.about().clone(),
            file,
            start,
            path: args.snapshot.clone(),
            disks: args.disks.clone(),
            memory: args.memory_limit,
            layouts,
            block_length: args.session.block_length,
        })
    }

    /// What the snapshot says of itself.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Which file it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The machine, as it was when it was saved.
    ///
    /// # Errors
    /// The rest of the snapshot cannot be read, or there can be no such machine here.
    pub fn build(&self) -> Result<Machine> {
        let what = || format!("cannot read the snapshot {}", self.path.display());
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.start)).with_context(what)?;
        let opened = super::begin(&self.path, file)?;
        let disks = self.disks.iter().map(|path| {
            let disk: Box<dyn DiskImage> = Box::new(Disk::open(path)?);
            Ok(disk)
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        let wanted = opened.about().disks.clone();
        let machine = opened.build(self.memory, disks, |mut builder| {
            if let Some(layouts) = &self.layouts {
                builder = builder.vmcs_layouts(layouts.clone());
            }
            match self.block_length {
                Some(length) => builder.block_length(length),
                None => builder,
            }
        });
        let shown = self.path.display();
        machine
            .with_context(|| format!("snapshot {shown}"))
            .map_err(|error| match error.downcast_ref::<SnapshotError>() {
                Some(SnapshotError::Disks { .. }) if !wanted.is_empty() => {
                    let names = wanted.join(", ");
                    error.context(format!("--disk is missing or too often: it had {names}"))
                }
                Some(SnapshotError::Memory { .. }) => error.context("--memory-limit"),
                _ => error,
            })
    }
}

/// The layouts from here on, where `args` say anything of them: those in memory stay accepted.
fn layouts(args: &ResumeArgs, own: &[Layout], config: &Config) -> Result<Option<VmxLayouts>> {
    if args.regions.write_vmcs.is_none() && args.regions.accept_vmcs.is_empty() {
        return Ok(None);
    }
    let mut layouts = config.layouts.clone();
    if let Some(name) = &args.regions.write_vmcs {
        let written = find_layout("--write-vmcs", name, own)?;
        let before = layouts.written.replace(written);
        layouts.accepted.extend(before);
    }
    for name in &args.regions.accept_vmcs {
        layouts
            .accepted
            .push(find_layout("--accept-vmcs", name, own)?);
    }
    let mut seen: Vec<Layout> = Vec::new();
    for layout in std::mem::take(&mut layouts.accepted) {
        if !seen.contains(&layout) {
            seen.push(layout);
        }
    }
    layouts.accepted = seen;
    if let Some(model) = Model::by_name(&config.model) {
        config.vmx.profile_with(model, &layouts)?;
    }
    Ok(Some(layouts))
}
