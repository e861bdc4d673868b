import { defineConfig } from 'vite';

// The page is a static site: relative addresses, so that it works from any folder of any server.
export default defineConfig({
  base: './',
  publicDir: false,
  build: {
    outDir: 'web/dist',
    emptyOutDir: true,
    target: 'es2022',
    assetsInlineLimit: 0,
  },
  worker: { format: 'es' },
  server: { watch: { ignored: ['**/target/**', '**/.cache/**'] } },
});
