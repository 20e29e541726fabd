"""What people do with a model. Import the module you need: nothing here is loaded by `import timm_spot`."""
