//! `cargo xtask demo`: everything from source to a page in the browser.

use std::net::TcpListener;

use anyhow::{Context, Result, bail};

use crate::{build, guests, serve, setup};

const PORT: u16 = 8086;

pub fn main(args: &[&str]) -> Result<bool> {
    let (mut check, mut port) = (false, None);
    let mut args = args.iter();
    while let Some(&arg) = args.next() {
        match arg {
            "--check" => check = true,
            "--port" => {
                port = Some(
                    args.next()
                        .context("--port needs a number")?
                        .parse::<u16>()?,
                )
            }
            _ => bail!("unknown option {arg}; there are --check and --port N"),
        }
    }
    let advice = setup::install()?;
    if !advice.is_empty() {
        println!("Going on without; what needs it will say so.");
    }
    let cli = build::cli()?;
    build::wasm()?;
    build::page()?;
    guests::make_what_is_possible()?;
    println!(
        "Built: {} and {}",
        cli.display(),
        build::page_dir().display()
    );
    if check {
        return Ok(true);
    }
    let site = serve::Site::new()
        .mount("/", build::page_dir())
        .mount("/guests/", guests::dir());
    let listener = match port {
        Some(port) => TcpListener::bind(("127.0.0.1", port))
            .with_context(|| format!("port {port} cannot be had"))?,
        None => {
            TcpListener::bind(("127.0.0.1", PORT)).or_else(|_| TcpListener::bind("127.0.0.1:0"))?
        }
    };
    println!(
        "\nThe page is at http://{}/   (Ctrl-C ends)",
        listener.local_addr()?
    );
    serve::forever(&listener, &site)
}
