class Processor: pass
