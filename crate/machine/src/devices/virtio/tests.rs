use super::*;

const DESCRIPTORS: u64 = 0x1000;
const DRIVER: u64 = 0x3000;
const DEVICE: u64 = 0x4000;
const DATA: u64 = 0x8000;

struct Driver {
    ram: Ram,
    device: VirtioMmio,
    output: Vec<u8>,
    available: u16,
}

impl Driver {
    fn new(backend: Backend) -> Driver {
        let mut driver = Driver {
            ram: Ram::new(1 << 20).unwrap(),
            device: VirtioMmio::new(backend),
            output: Vec::new(),
            available: 0,
        };
        driver.write(spec::STATUS, 3);
        driver.write(spec::DRIVER_FEATURES_SELECT, 1);
        driver.write(spec::DRIVER_FEATURES, 1);
        driver.write(spec::STATUS, 0xb);
        assert_eq!(driver.read(spec::STATUS), 0xb);
        for queue in 0..driver.device.backend.queues() as u64 {
            driver.write(spec::QUEUE_SELECT, queue as u32);
            assert_eq!(driver.read(spec::QUEUE_SIZE_MAX), 256);
            driver.write(spec::QUEUE_SIZE, 8);
            driver.write(
                spec::QUEUE_DESCRIPTORS,
                (DESCRIPTORS + queue * 0x4000) as u32,
            );
            driver.write(spec::QUEUE_DRIVER, (DRIVER + queue * 0x4000) as u32);
            driver.write(spec::QUEUE_DEVICE, (DEVICE + queue * 0x4000) as u32);
            driver.write(spec::QUEUE_READY, 1);
        }
        driver.write(spec::STATUS, 0xf);
        driver
    }

    fn read(&mut self, offset: u64) -> u32 {
        self.device.read(offset, 4) as u32
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device
            .write(&mut self.ram, offset, 4, u64::from(value), &mut self.output);
    }

    fn descriptor(&mut self, base: u64, index: u64, address: u64, len: u32, flags: u16, next: u16) {
        let at = base + 16 * index;
        self.ram.write(at, &address.to_le_bytes()).unwrap();
        self.ram.write(at + 8, &len.to_le_bytes()).unwrap();
        self.ram.write(at + 12, &flags.to_le_bytes()).unwrap();
        self.ram.write(at + 14, &next.to_le_bytes()).unwrap();
    }

    fn offer(&mut self, base: u64, head: u16) {
        let slot = u64::from(self.available % 8);
        self.ram
            .write(base + 4 + 2 * slot, &head.to_le_bytes())
            .unwrap();
        self.available = self.available.wrapping_add(1);
        self.ram
            .write(base + 2, &self.available.to_le_bytes())
            .unwrap();
    }

    /// A block request; the status byte and what was written.
    fn block(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, Vec<u8>) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.ram.write(DATA, &header).unwrap();
        self.ram.write(DATA + 0x1000, data).unwrap();
        self.ram.write(DATA + 0x8000, &[0xee]).unwrap();
        self.descriptor(DESCRIPTORS, 0, DATA, 16, 1, 1);
        if room == 0 {
            self.descriptor(DESCRIPTORS, 1, DATA + 0x1000, data.len() as u32, 1, 2);
        } else {
            self.descriptor(DESCRIPTORS, 1, DATA + 0x4000, room, 3, 2);
        }
        self.descriptor(DESCRIPTORS, 2, DATA + 0x8000, 1, 2, 0);
        self.offer(DRIVER, 0);
        self.write(spec::QUEUE_NOTIFY, 0);
        let mut got = vec![0; room as usize];
        self.ram.read(DATA + 0x4000, &mut got).unwrap();
        let [status] = self.ram.load(DATA + 0x8000).unwrap();
        (status, got)
    }
}

fn disk(read_only: bool) -> Driver {
    let image: Vec<u8> = (0..10_000u32).map(|i| (i / 512) as u8 + 1).collect();
    Driver::new(Backend::Block(Block::new(Box::new(image), read_only)))
}

#[test]
fn identification_and_capacity() {
    let mut driver = disk(false);
    assert_eq!(driver.read(spec::MAGIC), 0x7472_6976);
    assert_eq!(driver.read(spec::VERSION), 2);
    assert_eq!(driver.read(spec::DEVICE_ID), 2);
    assert_eq!(driver.device.read(spec::CONFIG, 8), 20);
    driver.write(spec::DEVICE_FEATURES_SELECT, 1);
    assert_eq!(driver.read(spec::DEVICE_FEATURES), 1);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let mut driver = disk(false);
    driver.write(spec::STATUS, 0);
    driver.write(spec::DRIVER_FEATURES_SELECT, 0);
    driver.write(spec::DRIVER_FEATURES, 1 << 31);
    driver.write(spec::STATUS, 0xb);
    assert_eq!(driver.read(spec::STATUS), 3);
}

#[test]
fn reads_give_the_image_and_zeros_after_its_end() {
    let mut driver = disk(false);
    assert_eq!(
        driver.block(0, 3, &[], 1024),
        (0, [[4; 512], [5; 512]].concat())
    );
    let (status, last) = driver.block(0, 19, &[], 512);
    assert_eq!((status, last[271], last[272]), (0, 20, 0));
    assert_eq!(driver.read(spec::INTERRUPT_STATUS), 1);
    assert!(driver.device.line());
    driver.write(spec::INTERRUPT_ACK, 1);
    assert!(!driver.device.line());
}

#[test]
fn writes_stay_in_the_overlay_and_are_read_back() {
    let mut driver = disk(false);
    assert_eq!(driver.block(1, 3, &[0xaa; 512], 0).0, 0);
    let (_, got) = driver.block(0, 2, &[], 3 * 512);
    assert_eq!(got, [[3; 512], [0xaa; 512], [5; 512]].concat());
    let saved = driver.device.state();
    let mut other = disk(false);
    assert!(other.device.restore(&saved));
    assert_eq!(other.device.state(), saved);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let mut driver = disk(true);
    assert_eq!(driver.block(1, 0, &[0; 512], 0).0, 1);
    assert_eq!(driver.block(0, 0, &[], 512).1, [1; 512]);
}

#[test]
fn requests_past_the_end_or_of_half_a_sector_fail() {
    let mut driver = disk(false);
    for (sector, room) in [(20, 512), (19, 1024), (u64::MAX, 512), (0, 100)] {
        assert_eq!(driver.block(0, sector, &[], room).0, 1);
    }
    assert_eq!(driver.block(77, 0, &[], 512).0, 2);
    assert_eq!(driver.block(4, 0, &[], 0).0, 0);
    assert_eq!(&driver.block(8, 0, &[], 20).1[..9], b"hypernest");
}

#[test]
fn a_looping_or_foreign_chain_asks_for_a_reset() {
    type Spoil = fn(&mut Driver);
    let spoilers: [Spoil; 5] = [
        |d| d.descriptor(DESCRIPTORS, 2, DATA, 1, 3, 1),
        |d| d.descriptor(DESCRIPTORS, 2, DATA, 1, 3, 200),
        |d| d.descriptor(DESCRIPTORS, 2, u64::MAX, 1, 2, 0),
        |d| d.descriptor(DESCRIPTORS, 2, DATA, u32::MAX, 2, 0),
        |d| d.available = d.available.wrapping_add(100),
    ];
    for spoil in spoilers {
        let mut driver = disk(false);
        driver.descriptor(DESCRIPTORS, 0, DATA, 16, 1, 1);
        driver.descriptor(DESCRIPTORS, 1, DATA + 0x4000, 512, 3, 2);
        driver.descriptor(DESCRIPTORS, 2, DATA + 0x8000, 1, 2, 0);
        spoil(&mut driver);
        driver.offer(DRIVER, 0);
        driver.write(spec::QUEUE_NOTIFY, 0);
        assert_eq!(driver.read(spec::STATUS), 0x4f);
        assert_eq!(driver.read(spec::INTERRUPT_STATUS), 2);
        driver.write(spec::STATUS, 0);
        assert_eq!(driver.read(spec::STATUS), 0);
    }
}

#[test]
fn any_registers_and_rings_neither_panic_nor_hang() {
    let mut driver = disk(false);
    let mut seed = 7u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
        seed >> 32
    };
    for round in 0..20_000 {
        let offset = random() & 0x1ff;
        driver.write(offset & !3, (random() & 0xffff) as u32);
        driver.device.read(offset, 1 << (round & 3));
        let at = random() & 0xf_fff8;
        driver.ram.write(at, &random().to_le_bytes()).unwrap();
        driver.write(spec::QUEUE_NOTIFY, 0);
    }
}

#[test]
fn the_terminal_prints_and_reads() {
    let mut driver = Driver::new(Backend::Console(Console::default()));
    driver.ram.write(DATA + 0x4000, b"hello").unwrap();
    driver.descriptor(DESCRIPTORS + 0x4000, 0, DATA + 0x4000, 5, 0, 0);
    driver.offer(DRIVER + 0x4000, 0);
    driver.write(spec::QUEUE_NOTIFY, 1);
    assert_eq!(driver.output, b"hello");

    driver.available = 0;
    driver.descriptor(DESCRIPTORS, 0, DATA + 0x9000, 3, 2, 0);
    driver.offer(DRIVER, 0);
    driver.write(spec::QUEUE_NOTIFY, 0);
    driver.device.feed(&mut driver.ram, b"abcd");
    assert_eq!(driver.ram.load(DATA + 0x9000).unwrap(), *b"abc");
    driver.descriptor(DESCRIPTORS, 0, DATA + 0x9100, 3, 2, 0);
    driver.offer(DRIVER, 0);
    driver.write(spec::QUEUE_NOTIFY, 0);
    assert_eq!(driver.ram.load(DATA + 0x9100).unwrap(), *b"d");
}
