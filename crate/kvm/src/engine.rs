//! One VM of the host's kernel with one vCPU, as an engine.
#![expect(
    unsafe_code,
    reason = "the kernel maps guest RAM by address; kvm-ioctls marks that call unsafe"
)]

use std::time::Instant;

use hypernest_cpu::{Activity, Bus, Ram, Tick, VcpuState};
use hypernest_machine::{
    Capabilities, Clock, Engine, EngineConfig, EngineError, EngineStop, Owner, VmxChoice,
};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::convert::{MSRS, from_fpu, from_regs, from_sregs, to_fpu, to_regs, to_sregs};

const NAME: &str = "kvm";
/// errno of an interrupted KVM_RUN.
const EINTR: i32 = 4;

/// A vCPU of the host's kernel.
pub struct KvmEngine {
    vcpu: VcpuFd,
    vm: VmFd,
    /// Where the RAM of the last run lay: the kernel's memory slots point there.
    mapped: Option<(usize, u64)>,
    /// What KVM does not hold.
    rest: VcpuState,
    /// Tick at `since`.
    base: Tick,
    since: Instant,
    halted: bool,
}

fn failed(what: &'static str, why: impl ToString) -> EngineError {
    EngineError::Host {
        engine: NAME,
        what,
        why: why.to_string(),
    }
}

fn ioctl<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, EngineError> {
    result.map_err(|error| failed(what, error))
}

fn missing(what: &'static str) -> EngineError {
    EngineError::Missing { engine: NAME, what }
}

impl KvmEngine {
    /// A VM with one vCPU in reset state. Its CPUID is what the host's KVM supports.
    pub fn new(config: &EngineConfig) -> Result<KvmEngine, EngineError> {
        if config.cpus != 1 {
            return Err(missing("more than one vCPU"));
        }
        if config.vmx != VmxChoice::None {
            return Err(missing("VMX inside"));
        }
        if config.hyperv {
            return Err(missing("the Hyper-V interface"));
        }
        let kvm = ioctl("open /dev/kvm", Kvm::new())?;
        let vm = ioctl("KVM_CREATE_VM", kvm.create_vm())?;
        let vcpu = ioctl("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let cpuid = ioctl("KVM_GET_SUPPORTED_CPUID", cpuid)?;
        ioctl("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))?;
        let rest = VcpuState::reset(0, config.model);
        let mut engine = KvmEngine {
            vcpu,
            vm,
            mapped: None,
            rest: rest.clone(),
            base: 0,
            since: Instant::now(),
            halted: false,
        };
        engine.write_state(0, &rest)?;
        Ok(engine)
    }

    /// Points the kernel's memory slots at `ram`.
    fn map(&mut self, ram: &Ram) -> Result<(), EngineError> {
        let place = (ram.as_ptr() as usize, ram.size());
        if self.mapped == Some(place) {
            return Ok(());
        }
        let base = ram.as_ptr() as u64;
        let ranges = [
            (0, ram.low_size(), base),
            (Ram::HOLE_END, ram.high_size(), base + ram.low_size()),
        ];
        for (slot, (address, size, host)) in ranges.into_iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: address,
                memory_size: 0,
                userspace_addr: host,
            };
            // A slot that moves is deleted and made again; size 0 deletes.
            let sizes = [(self.mapped.is_some(), 0), (size != 0, size)];
            for (_, memory_size) in sizes.into_iter().filter(|(wanted, _)| *wanted) {
                let region = kvm_userspace_memory_region {
                    memory_size,
                    ..region
                };
                // SAFETY: the range is all RAM. The guest touches it in `run` alone, where the RAM
                // is borrowed exclusively, and `run` maps anew when it is given another one.
                let result = unsafe { self.vm.set_user_memory_region(region) };
                // Deleting a slot that was never made (no RAM above 4 GiB) fails, rightly.
                if memory_size != 0 {
                    ioctl("KVM_SET_USER_MEMORY_REGION", result)?;
                }
            }
        }
        self.mapped = Some(place);
        Ok(())
    }

    fn now(&self) -> Tick {
        self.base
            .saturating_add(self.since.elapsed().as_nanos() as Tick)
    }

    /// Lets the kernel finish an access that has been answered, without running the guest any
    /// further (api.rst, KVM_RUN, `immediate_exit`).
    fn settle(&mut self) -> Result<(), EngineError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let result = self.vcpu.run().map(|_| ());
        self.vcpu.set_kvm_immediate_exit(0);
        match result {
            Err(error) if error.errno() != EINTR => Err(failed("KVM_RUN", error)),
            _ => Ok(()),
        }
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            nested_vmx: false,
            exact_ticks: false,
            local_apic: Owner::Host,
            clock: Owner::Host,
            dirty_tracking: false,
        }
    }

    fn vcpus(&self) -> usize {
        1
    }

    /// `until` is looked at when the guest leaves to the board: one that never does is not
    /// interrupted.
    fn run(
        &mut self,
        ram: &mut Ram,
        bus: &mut dyn Bus,
        until: Tick,
    ) -> Result<EngineStop, EngineError> {
        self.map(ram)?;
        if self.halted {
            return Ok(EngineStop::Idle);
        }
        loop {
            let now = self.now();
            bus.advance(ram, now);
            let stop = if bus.stop_requested() {
                Some(EngineStop::Board)
            } else if now >= until {
                Some(EngineStop::Deadline)
            } else {
                None
            };
            if let Some(stop) = stop {
                self.settle()?;
                return Ok(stop);
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let width = data.len() as u8;
                    bus.port_write(ram, now, port, width, value(data) as u32);
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let read = bus.port_read(ram, now, port, data.len() as u8);
                    fill(data, u64::from(read));
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    bus.mmio_write(ram, now, address, data.len() as u8, value(data));
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    let read = bus.mmio_read(ram, now, address, data.len() as u8);
                    fill(data, read);
                }
                Ok(VcpuExit::Hlt) => {
                    self.halted = true;
                    return Ok(EngineStop::Idle);
                }
                Ok(VcpuExit::Shutdown) => return Ok(EngineStop::TripleFault { vcpu: 0 }),
                Ok(VcpuExit::Intr) => (),
                Ok(other) => return Err(failed("KVM_RUN", format!("{other:?}"))),
                Err(error) if error.errno() == EINTR => (),
                Err(error) => return Err(failed("KVM_RUN", error)),
            }
        }
    }

    /// Wall time, a tick a nanosecond: KVM counts no instructions.
    fn clock(&self) -> Clock {
        Clock {
            now: self.now(),
            ..Clock::default()
        }
    }

    fn set_clock(&mut self, clock: Clock) {
        self.base = clock.now;
        self.since = Instant::now();
    }

    fn instructions(&self) -> Option<u64> {
        None
    }

    fn read_state(&self, vcpu: usize) -> Result<VcpuState, EngineError> {
        if vcpu != 0 {
            return Err(EngineError::Vcpu(vcpu));
        }
        let mut state = self.rest.clone();
        from_regs(&mut state, &ioctl("KVM_GET_REGS", self.vcpu.get_regs())?);
        from_sregs(&mut state, &ioctl("KVM_GET_SREGS", self.vcpu.get_sregs())?);
        from_fpu(&mut state, &ioctl("KVM_GET_FPU", self.vcpu.get_fpu())?);
        let entries: Vec<_> = MSRS.iter().map(|(index, _)| entry(*index, 0)).collect();
        let mut msrs = msrs(&entries)?;
        let read = ioctl("KVM_GET_MSRS", self.vcpu.get_msrs(&mut msrs))?;
        if read != entries.len() {
            return Err(failed("KVM_GET_MSRS", format!("MSR {:#x}", MSRS[read].0)));
        }
        for (entry, (_, field)) in msrs.as_slice().iter().zip(MSRS) {
            *field(&mut state) = entry.data;
        }
        state.activity = if self.halted {
            Activity::Halted
        } else {
            Activity::Active
        };
        Ok(state)
    }

    fn write_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        if vcpu != 0 {
            return Err(EngineError::Vcpu(vcpu));
        }
        if !matches!(state.activity, Activity::Active | Activity::Halted) {
            return Err(missing("vCPU that is shut down or waits for start-up"));
        }
        let before = ioctl("KVM_GET_SREGS", self.vcpu.get_sregs())?;
        let sregs = to_sregs(state, before);
        ioctl("KVM_SET_SREGS", self.vcpu.set_sregs(&sregs))?;
        ioctl("KVM_SET_REGS", self.vcpu.set_regs(&to_regs(state)))?;
        ioctl("KVM_SET_FPU", self.vcpu.set_fpu(&to_fpu(&state.fpu)))?;
        let mut copy = state.clone();
        let entries: Vec<_> = MSRS
            .iter()
            .map(|(index, field)| entry(*index, *field(&mut copy)))
            .collect();
        let written = ioctl("KVM_SET_MSRS", self.vcpu.set_msrs(&msrs(&entries)?))?;
        if written != entries.len() {
            return Err(failed(
                "KVM_SET_MSRS",
                format!("MSR {:#x}", MSRS[written].0),
            ));
        }
        self.halted = state.activity == Activity::Halted;
        self.rest = copy;
        Ok(())
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) -> Result<(), EngineError> {
        if addresses.is_empty() {
            Ok(())
        } else {
            Err(missing("breakpoints"))
        }
    }

    /// The host's processor keeps its caches right by itself.
    fn flush(&mut self, _: &mut Ram) {}
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, EngineError> {
    Msrs::from_entries(entries).map_err(|error| failed("a list of MSRs", format!("{error:?}")))
}

fn value(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let n = data.len().min(8);
    bytes[..n].copy_from_slice(&data[..n]);
    u64::from_le_bytes(bytes)
}

fn fill(data: &mut [u8], value: u64) {
    let bytes = value.to_le_bytes();
    let n = data.len().min(8);
    data[..n].copy_from_slice(&bytes[..n]);
}
