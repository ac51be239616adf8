//! Layout records name the package that defines a table. The skewed copy stands for a changed vmm-abi, so it is to be refused for
//! its layout, not for coming from a package of another name.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=CARGO_PKG_NAME=vmm-abi");
}
