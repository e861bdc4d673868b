//! A hypervisor that does what a test tells it: it starts a guest, and between a VM exit and the next
//! entry executes the instructions that the test gives it. Nothing is flushed on the way.

use std::sync::Arc;

use hypernest_cpu::{
    Model, NestedReport, Processor, ProcessorConfig, Ram, Stop, Tick, VcpuState, VmxChoice,
    VmxProfile,
};
use hypernest_vmcs::{ExitReason, Field, GuestSegment, entry, exit, pin, proc1, proc2};
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, eax, ecx, edx, qword_ptr, rax, rcx, rsi};

use super::{CODE, Nothing, long_mode};

pub const VMXON: u64 = 0x4_0000;
pub const VMCS: u64 = 0x4_1000;
/// A VMCS that is never entered: the shadow VMCS of some tests.
pub const OTHER_VMCS: u64 = 0x4_4000;
/// Where the hypervisor keeps pointers to the regions, and its table of fields.
pub const POINTERS: u64 = 0x4_2000;
const TABLE: u64 = 0x4_3000;
/// Where VM exits lead: the hypervisor jumps to what it finds at `NEXT`, which is here while it waits
/// for the test.
pub const HANDLER: u64 = 0x1_1000;
const NEXT: u64 = 0x4_2f00;
/// What the test wants done, and the next entry.
const ACTION: u64 = HANDLER + 0x100;
pub const GUEST: u64 = 0x1_2000;
const GUEST_STACK: u64 = 0x5_0000;
const HOST_STACK: u64 = 0x5_2000;
/// Pages for whatever a test needs: bitmaps, logs, lists.
pub const PAGES: u64 = 0x5_8000;
/// Extended page tables: four pages, one to one for 2 MiB; another set 10000H on.
pub const EPT: u64 = 0x6_0000;
pub const EPT2: u64 = 0x7_0000;
/// In an EPT entry: readable, writable, executable, write-back.
pub const RWX: u64 = 7 | 6 << 3;

/// Ticks that an L1 or L2 may take from one exit to the next.
const PATIENCE: Tick = 100_000;

pub type Emit<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Instructions for address `at`.
pub fn assemble(at: u64, emit: Emit) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    emit(&mut a).unwrap();
    a.assemble(at).unwrap()
}

/// The EPT pointer to tables at `root`: four levels, write-back.
pub fn eptp(root: u64) -> u64 {
    root | 3 << 3 | 6
}

/// Accessed and dirty flags, in an EPT pointer.
pub const AD: u64 = 1 << 6;

/// Where the EPT entry of the page at `address` is, in the tables at `root`.
pub fn ept_entry(root: u64, address: u64) -> u64 {
    root + 0x3000 + 8 * (address >> 12)
}

/// How the guest starts.
pub struct Setup<'a> {
    pub choice: VmxChoice,
    /// Bits of the secondary controls; EPT brings its pointer along.
    pub proc2: u32,
    /// Fields that differ from the ordinary ones, written last.
    pub fields: &'a [(Field, u64)],
    pub guest: Emit<'a>,
}

pub struct L1 {
    pub processor: Processor,
    pub ram: Ram,
    profile: Arc<VmxProfile>,
    writes: Vec<(Field, u64)>,
    /// What the VMCS is filled with.
    pub fields: Vec<(Field, u64)>,
    /// What ended the last run, where it was no VM exit.
    pub stop: Option<Stop>,
}

impl L1 {
    /// A hypervisor ready to start its guest; memory may still be changed.
    pub fn new(setup: &Setup) -> L1 {
        let model = <&Model>::default();
        let profile = setup.choice.profile(model).unwrap().unwrap();
        L1::with(setup, profile)
    }

    /// As [`L1::new`], on a processor with this VMX.
    pub fn with(setup: &Setup, profile: Arc<VmxProfile>) -> L1 {
        L1::on(setup, profile, false)
    }

    /// The same, with or without the Hyper-V interface.
    pub fn on(setup: &Setup, profile: Arc<VmxProfile>, hyperv: bool) -> L1 {
        let config = ProcessorConfig {
            vmx: Some(profile.clone()),
            hyperv,
            ..ProcessorConfig::default()
        };
        let mut processor = Processor::new(&config).unwrap();
        let (ram, mut state) = long_mode(&processor);
        state.cr4 |= 1 << 13;
        state.rip = CODE;
        processor.write_state(0, &state).unwrap();
        let mut l1 = L1 {
            processor,
            ram,
            profile,
            writes: Vec::new(),
            fields: Vec::new(),
            stop: None,
        };
        let mut fields = l1.ordinary_fields(&state, setup.proc2);
        fields.extend_from_slice(setup.fields);
        let revision = u64::from(l1.profile.layout.revision());
        for (n, region) in [VMXON, VMCS, OTHER_VMCS].into_iter().enumerate() {
            l1.put(region, revision);
            l1.put(POINTERS + 8 * n as u64, region);
        }
        for (n, (field, value)) in fields.iter().enumerate() {
            l1.put(TABLE + 16 * n as u64, u64::from(field.encoding()));
            l1.put(TABLE + 16 * n as u64 + 8, *value);
        }
        l1.put(TABLE + 16 * fields.len() as u64, !0);
        l1.fields = fields;
        for root in [EPT, EPT2] {
            for level in 0..3 {
                l1.put(root + (level << 12), (root + ((level + 1) << 12)) | 7);
            }
            for page in 0..512 {
                l1.put(ept_entry(root, page << 12), page << 12 | RWX);
            }
        }
        l1.ram.write(CODE, &launcher()).unwrap();
        let wait = assemble(HANDLER, &|a| a.jmp(qword_ptr(NEXT)));
        l1.ram.write(HANDLER, &wait).unwrap();
        l1.put(NEXT, HANDLER);
        l1.ram.write(GUEST, &assemble(GUEST, setup.guest)).unwrap();
        l1
    }

    /// Goes on in a fresh processor with this VMX and a copy of memory, by way of the nested state and the
    /// registers.
    pub fn carry(&mut self, profile: &Arc<VmxProfile>, nested_first: bool) -> NestedReport {
        let state = self.state();
        let blob = self.processor.nested_state(0, &self.ram).to_bytes();
        assert_eq!(self.state(), state, "getting changes nothing");
        let mut there = Processor::new(&ProcessorConfig {
            vmx: Some(profile.clone()),
            ..ProcessorConfig::default()
        })
        .unwrap();
        there.set_time(self.processor.now(), self.processor.turn());
        let mut ram = Ram::new(self.ram.size()).unwrap();
        ram.bytes_mut().copy_from_slice(self.ram.bytes());
        if !nested_first {
            there.write_registers(0, &state).unwrap();
        }
        let report = there.set_nested_state(0, &mut ram, &blob).unwrap();
        if nested_first {
            there.write_registers(0, &state).unwrap();
        }
        if profile.written() == self.profile.written() {
            assert!(
                there.nested_state(0, &ram).to_bytes() == blob,
                "it is what was set"
            );
        }
        (self.processor, self.ram, self.profile) = (there, ram, profile.clone());
        report
    }

    /// Runs for one tick.
    pub fn tick(&mut self) {
        let until = self.processor.now() + 1;
        self.processor.run(&mut self.ram, &mut Nothing, until);
    }

    /// Runs tick by tick until this holds of the state.
    pub fn tick_until(&mut self, holds: impl Fn(&VcpuState) -> bool) {
        for _ in 0..1000 {
            if holds(&self.state()) {
                return;
            }
            self.tick();
        }
        panic!("it never held: {:#x?}", self.state());
    }

    /// What `change` makes of the state.
    pub fn change(&mut self, change: impl Fn(&mut VcpuState)) {
        let mut state = self.state();
        change(&mut state);
        self.processor.write_state(0, &state).unwrap();
    }

    /// As [`L1::new`], and runs to the first VM exit.
    pub fn start(setup: &Setup) -> L1 {
        let mut l1 = L1::new(setup);
        l1.run();
        l1
    }

    pub fn put(&mut self, at: u64, value: u64) {
        self.ram.write(at, &value.to_le_bytes()).unwrap();
    }

    pub fn word(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.ram.load(at).unwrap())
    }

    pub fn state(&self) -> VcpuState {
        self.processor.read_state(0)
    }

    /// Runs until the next VM exit, or until there is none.
    pub fn run(&mut self) {
        let end = self.processor.now() + PATIENCE;
        while self.processor.now() < end {
            let until = self.processor.now() + 100;
            let stop = self.processor.run(&mut self.ram, &mut Nothing, until);
            if stop != Stop::Deadline {
                self.stop = Some(stop);
                return;
            }
            if self.state().rip == HANDLER && self.word(NEXT) == HANDLER {
                return;
            }
        }
        self.stop = Some(Stop::Deadline);
    }

    /// A field of the current VMCS.
    pub fn field(&self, field: Field) -> u64 {
        let state = self.state();
        let wanted = field.encoding();
        let found = state.vmx.fields.iter().find(|(n, _)| *n == wanted);
        found.map_or(0, |(_, value)| *value)
    }

    /// Reason (with bit 31) and qualification of the last VM exit.
    pub fn exit(&self) -> (u64, u64) {
        assert_eq!(self.stop, None, "{:#x?}", self.state());
        (
            self.field(Field::VM_EXIT_REASON),
            self.field(Field::EXIT_QUALIFICATION),
        )
    }

    pub fn reason(&self) -> ExitReason {
        ExitReason(self.exit().0 as u16)
    }

    /// Writes a field before the next entry.
    pub fn set(&mut self, field: Field, value: u64) {
        self.writes.push((field, value));
    }

    /// The guest goes on behind the instruction that exited.
    pub fn skip(&mut self) {
        let length = self.field(Field::VM_EXIT_INSTRUCTION_LEN);
        self.set(Field::GUEST_RIP, self.field(Field::GUEST_RIP) + length);
    }

    /// Lets L1 execute `emit`, then go on with its guest up to the next exit.
    pub fn resume_after(&mut self, emit: Emit) {
        self.plan(emit);
        self.run();
    }

    /// The guest goes on up to the instruction at `rip`; whether it gets there.
    pub fn resume_to(&mut self, rip: u64) -> bool {
        self.plan(&|_| Ok(()));
        let end = self.processor.now() + PATIENCE;
        while self.processor.now() < end {
            let until = self.processor.now() + 1;
            self.processor.run(&mut self.ram, &mut Nothing, until);
            if self.state().rip == rip {
                return true;
            }
        }
        false
    }

    /// What L1 does next, and the entry after it.
    fn plan(&mut self, emit: Emit) {
        assert_eq!(self.stop, None, "{:#x?}", self.state());
        let writes = std::mem::take(&mut self.writes);
        let code = assemble(ACTION, &|a| {
            a.mov(qword_ptr(NEXT), HANDLER as i32)?;
            // The guest's registers are in use; L1 keeps its own in memory.
            a.push(rax)?;
            a.push(rcx)?;
            a.push(rsi)?;
            emit(a)?;
            for (field, value) in &writes {
                a.mov(rax, u64::from(field.encoding()))?;
                a.mov(rcx, *value)?;
                a.vmwrite(rax, rcx)?;
            }
            a.pop(rsi)?;
            a.pop(rcx)?;
            a.pop(rax)?;
            a.vmresume()?;
            a.hlt()
        });
        self.ram.write(ACTION, &code).unwrap();
        self.put(NEXT, ACTION);
    }

    pub fn resume(&mut self) {
        self.resume_after(&|_| Ok(()));
    }

    /// The guest goes on behind the instruction that exited, up to the next exit.
    pub fn next(&mut self) -> (u64, u64) {
        self.skip();
        self.resume();
        self.exit()
    }

    /// A 64-bit host and a 64-bit guest that share page tables.
    fn ordinary_fields(&self, state: &VcpuState, secondary: u32) -> Vec<(Field, u64)> {
        use Field as F;
        let caps = &self.profile.caps;
        let must = |allowed0: u32, wanted: u32| u64::from(allowed0 | wanted);
        let proc1_wanted = proc1::HLT_EXITING | proc1::ACTIVATE_SECONDARY_CONTROLS;
        let (pins, proc1s) = (caps.pin_allowed0(), caps.proc1_allowed0());
        let entries = must(caps.entry_allowed0(), entry::IA_32E_MODE_GUEST);
        let exits = must(caps.exit_allowed0(), exit::HOST_ADDRESS_SPACE_SIZE);
        let mut list = vec![
            (
                F::PIN_BASED_VM_EXEC_CONTROL,
                must(pins, pin::EXTERNAL_INTERRUPT_EXITING),
            ),
            (F::CPU_BASED_VM_EXEC_CONTROL, must(proc1s, proc1_wanted)),
            (F::SECONDARY_VM_EXEC_CONTROL, u64::from(secondary)),
            (F::VM_EXIT_CONTROLS, exits),
            (F::VM_ENTRY_CONTROLS, entries),
            (F::VMCS_LINK_POINTER, !0),
            (F::HOST_CS_SELECTOR, 8),
            (F::HOST_SS_SELECTOR, 16),
            (F::HOST_DS_SELECTOR, 16),
            (F::HOST_ES_SELECTOR, 16),
            (F::HOST_FS_SELECTOR, 16),
            (F::HOST_GS_SELECTOR, 16),
            (F::HOST_TR_SELECTOR, 24),
            (F::HOST_CR0, state.cr0),
            (F::HOST_CR3, state.cr3),
            (F::HOST_CR4, state.cr4),
            (F::HOST_GDTR_BASE, state.gdtr.base),
            (F::HOST_IDTR_BASE, state.idtr.base),
            (F::HOST_RIP, HANDLER),
            (F::HOST_RSP, HOST_STACK),
            (F::GUEST_CR0, state.cr0),
            (F::GUEST_CR3, state.cr3),
            (F::GUEST_CR4, state.cr4),
            (F::GUEST_GDTR_BASE, state.gdtr.base),
            (F::GUEST_GDTR_LIMIT, 0xff),
            (F::GUEST_IDTR_BASE, state.idtr.base),
            (F::GUEST_IDTR_LIMIT, 0xfff),
            (F::GUEST_CS_SELECTOR, 8),
            (F::GUEST_CS_AR_BYTES, 0xa09b),
            (F::GUEST_CS_LIMIT, 0xffff_ffff),
            (F::GUEST_TR_SELECTOR, 24),
            (F::GUEST_TR_AR_BYTES, 0x8b),
            (F::GUEST_TR_LIMIT, 0x67),
            (F::GUEST_LDTR_AR_BYTES, 1 << 16),
            (F::GUEST_DR7, 0x400),
            (F::GUEST_RFLAGS, 2),
            (F::GUEST_RIP, GUEST),
            (F::GUEST_RSP, GUEST_STACK),
        ];
        for segment in GuestSegment::DATA {
            list.extend([
                (segment.selector, 16),
                (segment.rights, 0xc093),
                (segment.limit, 0xffff_ffff),
            ]);
        }
        if secondary & proc2::ENABLE_EPT != 0 {
            list.push((F::EPT_POINTER, eptp(EPT)));
        }
        if secondary & proc2::ENABLE_VPID != 0 {
            list.push((F::VIRTUAL_PROCESSOR_ID, 7));
        }
        list
    }
}

/// VMXON, VMCLEAR, VMPTRLD, a VMWRITE for each row of the table, VMLAUNCH. What follows a failed
/// entry is HLT.
fn launcher() -> Vec<u8> {
    assemble(CODE, &|a| {
        let mut next = a.create_label();
        let mut launch = a.create_label();
        a.mov(ecx, 0x3a)?;
        a.mov(eax, 5)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.vmxon(qword_ptr(POINTERS))?;
        a.vmclear(qword_ptr(POINTERS + 8))?;
        a.vmptrld(qword_ptr(POINTERS + 8))?;
        a.mov(rsi, TABLE)?;
        a.set_label(&mut next)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.cmp(rax, -1)?;
        a.je(launch)?;
        a.vmwrite(rax, qword_ptr(rsi + 8))?;
        a.add(rsi, 16)?;
        a.jmp(next)?;
        a.set_label(&mut launch)?;
        a.vmlaunch()?;
        a.hlt()
    })
}
