//! Assembles the guests.

mod elf;
mod greeting;
mod hypervisor;

fn main() {
    println!("cargo::rerun-if-changed=build");
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    for (name, guest) in [
        ("greeting.elf", greeting::guest()),
        ("hypervisor.elf", hypervisor::guest()),
    ] {
        let guest = guest.expect("the guest assembles");
        std::fs::write(std::path::Path::new(&out).join(name), guest)
            .expect("OUT_DIR can be written");
    }
}
